"""How programs are compiled that are to give the same numbers at every start."""

from typing import Any


def compiler_options(deterministic: bool) -> dict[str, Any]:
    """Options of `jax.jit`.

    Without them XLA chooses a GPU's products by how long they take while it compiles, so every start rounds in a way of
    its own.
    """
    return {"xla_gpu_deterministic_ops": True} if deterministic else {}
