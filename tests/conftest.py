import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The models of the tests are so small that compiling them takes longer than running them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest

FLAGS = {"xla_force_host_platform_device_count": "8"}
if jax.__version__.startswith("0.10."):  # 0.11 has no such flag, and the emitters cost a third of the suite
    FLAGS["xla_cpu_use_fusion_emitters"] = "false"
else:  # the kernels' interpreter runs: its threads wait for each other in XLA's pool, which must have room for all
    os.environ.setdefault("NPROC", "64")
for flag, value in FLAGS.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}={value}"

jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(params=["tiny", "grouped", "calm"])
def golden(request) -> pathlib.Path:
    """One folder of the official code's inputs and outputs; see tests/golden/README.md."""
    return GOLDEN / request.param
