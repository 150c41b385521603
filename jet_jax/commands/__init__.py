"""The subcommands of `jet-jax`, one module each with `add_parser(subparsers)` and `run(args)`."""
