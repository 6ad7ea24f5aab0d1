import contextlib

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from dmax_jax.kernels.decode_attention import fused_decode_attention
from dmax_jax.kernels.device_sums import zeros
from dmax_jax.kernels.expert_choice import choice_of, choose_by_counting
from dmax_jax.kernels.grouped_experts import grouped_experts
from dmax_jax.kernels.program import overlapping
from dmax_jax.kernels.projection import streamed_product
from dmax_jax.kernels.residual_norm import fused_add_and_norm
from dmax_jax.kernels.streamed_experts import streamed_experts
from tests.kernels.interpreter import needs_interpreter

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


def primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        yield from (name for inner in jaxprs_in_params(equation.params) for name in primitives(inner))


def kernels(jaxpr):
    """What each of the kernels is made of."""
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            if equation.primitive.name == "mpmd_map":
                yield set(primitives(inner))
            else:
                yield from kernels(inner)


@needs_interpreter
@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_waits_for_earlier_programs_where_it_starts_early(name):
    count, call = CALLS[name]
    early = {"griddepcontrol_wait", "griddepcontrol_launch_dependents"}
    for context, expected in ((overlapping, early), (contextlib.nullcontext, set())):
        with context():
            found = list(kernels(jax.make_jaxpr(lambda: call())().jaxpr))
        assert len(found) == count
        assert all(early & names == expected for names in found)
