import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from dmax_jax.decoding.generate import Geometry, generate
from dmax_jax.decoding.policies import SpdPolicy
from dmax_jax.decoding_flags import parse_mesh
from dmax_jax.kernels import hopper
from dmax_jax.kernels.decode_attention import fused_decode_attention
from dmax_jax.kernels.device_sums import Inbox, zeros
from dmax_jax.kernels.expert_choice import choice_of, choose_by_counting
from dmax_jax.kernels.grouped_experts import grouped_experts
from dmax_jax.kernels.program import overlapping
from dmax_jax.kernels.projection import streamed_product
from dmax_jax.kernels.residual_norm import fused_add_and_norm
from dmax_jax.kernels.streamed_experts import streamed_experts
from dmax_jax.measuring.weights import random_params
from dmax_jax.sharding import make_mesh
from tests.kernels.interpreter import needs_interpreter
from tests.models import SMALL

D, F, E = 512, 128, 256


def half(*shape):
    return jnp.zeros(shape, jnp.bfloat16)


def mlp(*first):
    return half(*first, F, D), half(*first, F, D), half(*first, D, F)


def experts(function, rows, **settings):
    return lambda: function(half(rows, D), choice_of(jnp.zeros((rows, E))), mlp(E), mlp(), **settings)


def attention():
    angles = [jnp.zeros((1, 32, 32))] * 2
    limits = jnp.zeros(1, jnp.int32), jnp.zeros(1, bool)
    given = half(1, 32, 8, 128), [half(128)] * 2, angles, [half(1, 64, 2, 128)] * 2
    return fused_decode_attention(*given, *limits, block_length=32, eps=1e-6)


CALLS = {
    "projection": (1, lambda: streamed_product(half(32, D), half(64, D))),
    "norm": (1, lambda: fused_add_and_norm(half(32, D), half(2, 32, D), half(D), eps=1e-6)),
    "attention": (1, attention),
    "choice": (
        1,
        lambda: choose_by_counting(
            jnp.zeros((32, E)), jnp.zeros(E), groups=8, kept_groups=4, experts_per_row=8, scale=1.0
        ),
    ),
    "few rows' experts": (1, experts(streamed_experts, 32)),
    "many rows' experts": (4, experts(grouped_experts, 256, experts_per_row=8)),
    "zeros": (1, lambda: zeros((2, D))),
}


MEMORY = {"copy_gmem_to_smem", "copy_smem_to_gmem", "load", "get", "swap", "addupdate"}
BEFORE = {"projection": 1, "norm": 1, "choice": 1 + 4}  # of weights and bias; and of a warpgroup's shared memory
START = {"griddepcontrol_wait", "griddepcontrol_launch_dependents"}


def primitives(jaxpr):
    """The names of what a kernel does, in order."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        yield from (name for inner in jaxprs_in_params(equation.params) for name in primitives(inner))


def kernels(jaxpr, loops=0):
    """How many loops each kernel is in, and what it does."""
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            if equation.primitive.name == "mpmd_map":
                yield loops, list(primitives(inner))
            else:
                yield from kernels(inner, loops + (equation.primitive.name == "while"))


@needs_interpreter
@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_that_starts_early_waits_before_all_but_its_weights(name):
    count, call = CALLS[name]
    with overlapping():
        found = [names for _, names in kernels(jax.make_jaxpr(lambda: call())().jaxpr)]
    assert len(found) == count
    for names in found:
        wait, start = names.index("griddepcontrol_wait"), names.index("griddepcontrol_launch_dependents")
        assert wait < start
        assert sum(primitive in MEMORY for primitive in names[:wait]) == BEFORE.get(name, 0)
    assert not any(START & set(names) for _, names in kernels(jax.make_jaxpr(lambda: call())().jaxpr))


@needs_interpreter
@pytest.mark.parametrize("overlap", [False, True])
def test_the_kernels_of_the_decode_loop_start_early_and_no_others(monkeypatch, overlap):
    monkeypatch.setattr(hopper, "has_hopper", lambda: True)
    sizes = {"hidden_size": D, "head_dim": 128, "intermediate_size": F, "moe_intermediate_size": F, "num_experts": 64}
    config = dataclasses.replace(SMALL, **sizes, n_group=8, topk_group=4, num_experts_per_tok=2)
    mesh = make_mesh(parse_mesh("tensor:1"))
    params = random_params(jax.random.key(0), config, jnp.bfloat16, mesh)
    decode = functools.partial(
        generate.__wrapped__, gen_length=32, geometry=Geometry(prefill=32, block_length=32, blocks=2),
        policy=SpdPolicy(), config=config, mask_id=config.mask_token_id, eos_id=-1, mesh=mesh, overlap=overlap,
    )  # fmt: skip
    prompt = jnp.zeros((1, 64), jnp.int32), jnp.full(1, 40), jax.random.split(jax.random.key(0), 1)
    found = list(kernels(jax.make_jaxpr(decode)(params, *prompt).jaxpr))
    assert {loops for loops, _ in found} == {0, 1, 2}  # the prefill, a forward with a finished block, one without
    assert all((set(names) >= START) == (overlap and loops > 0) for loops, names in found)


def test_over_several_devices_no_norm_starts_early():
    inbox = Inbox(jnp.zeros((2, 64, D), jnp.int32), jnp.zeros(32, jnp.int32), jnp.zeros((2, 2), jnp.int32))
    with overlapping(), pytest.raises(ValueError, match="several devices"):
        fused_add_and_norm(half(32, D), half(2, 32, D), half(D), inbox, eps=1e-6)
