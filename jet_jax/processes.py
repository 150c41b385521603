"""What has to be said to JAX before it touches a device."""

from __future__ import annotations

import os

import jax

from jet_jax.train_config import DistributedConfig


def start(config: DistributedConfig, compile_cache: str) -> None:
    """Joins the other processes, if there are any, and turns the compile cache on.

    Args:
      config: the processes.
      compile_cache: folder of compiled programs; empty for none.
    """
    if compile_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(compile_cache))
    if config.num_processes == 0:
        jax.distributed.initialize()
    elif config.num_processes > 1:
        jax.distributed.initialize(config.coordinator, config.num_processes, config.process_id)
