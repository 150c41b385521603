"""`python -m jet_jax`: the same as the command `jet-jax`."""

import sys

from jet_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
