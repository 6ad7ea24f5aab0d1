import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The models of the tests are so small that compiling them takes longer than running them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import pathlib

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(params=["tiny", "grouped", "calm"])
def golden(request) -> pathlib.Path:
    """One folder of the official code's inputs and outputs; see tests/golden/README.md."""
    return GOLDEN / request.param
