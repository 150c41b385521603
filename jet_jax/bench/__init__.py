"""Benchmarks that `jet-jax bench` runs: on any device, beside floors measured in the same run."""
