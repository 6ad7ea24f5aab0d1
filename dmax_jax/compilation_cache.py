"""Keeps compiled programs in the user's cache directory, so that a command's second start is quick."""

import os
import pathlib

import jax


def use_compilation_cache() -> None:
    """Turns on JAX's persistent cache, unless JAX_COMPILATION_CACHE_DIR already says where it is."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(home / "dmax_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
