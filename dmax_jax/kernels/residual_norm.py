"""The residual stream between two parts of a layer: what the one left is added, and the sum normalised for the other.

XLA makes two programs of that, and two more of the digits; the kernel for few rows reads a row once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from dmax_jax.kernels.device_sums import Inbox, sum_over_devices
from dmax_jax.kernels.hopper import differentiated_as, is_hopper
from dmax_jax.kernels.layers import rms_norm
from dmax_jax.kernels.program import kernel, start_next, wait_for_earlier
from dmax_jax.kernels.row_digits import BASE, LARGEST, Digits, in_digits

MAX_ROWS = 128
AT_ONCE = 4  # neighbouring entries that a thread loads
WIDTH = 128 * AT_ONCE  # entries that a warpgroup loads


def add_and_norm(
    x: jax.Array, parts: jax.Array | None, weight: jax.Array, eps: float, *, digits: bool = False
) -> tuple[jax.Array, jax.Array, Digits | None]:
    """The sum of `x` [..., D] and parts [P, ..., D], if there are any, and its RMS norm with the weights [D].

    The parts are summed in float32 and rounded to the dtype of `x` before they are added. With `digits`, the third
    result are those of the norm's rows (kernels/row_digits.py), and nothing has a gradient; else it is None.
    """
    rows = x.size // x.shape[-1]
    plain, fused = (functools.partial(function, eps=eps) for function in (plain_add_and_norm, fused_add_and_norm))
    if not (is_hopper() and suits(x.dtype, rows, x.shape[-1])):
        return plain(x, parts, weight, digits=digits)
    x_MD = x.reshape(rows, -1)
    parts_PMD = None if parts is None else parts.reshape(-1, *x_MD.shape)
    if digits:
        total_MD, normal_MD, found = fused(x_MD, parts_PMD, weight, digits=True)
    else:
        total_MD, normal_MD, found = differentiated_as(plain)(fused)(x_MD, parts_PMD, weight)
    return total_MD.reshape(x.shape), normal_MD.reshape(x.shape), found


def add_and_norm_over(
    axis: str,
    inbox: Inbox | None,
    x: jax.Array,
    parts: jax.Array,
    weight: jax.Array,
    eps: float,
    *,
    digits: bool = False,
) -> tuple[jax.Array, jax.Array, Digits | None]:
    """`add_and_norm` of parts of which every device along a mesh axis has some; all get the same, to the last bit.

    What a device has is summed first, and the sums, of the dtype of `x`, after that. It has no gradient.
    """
    rows = x.size // x.shape[-1]
    if inbox is None or not suits(x.dtype, rows, x.shape[-1]):
        whole = lax.psum(joined_parts(parts, x.dtype), axis)
        return add_and_norm(x, whole[None], weight, eps, digits=digits)
    x_MD = x.reshape(rows, -1)
    parts_PMD = parts.reshape(-1, *x_MD.shape)
    total_MD, normal_MD, found = fused_add_and_norm(x_MD, parts_PMD, weight, inbox, eps=eps, digits=digits)
    return total_MD.reshape(x.shape), normal_MD.reshape(x.shape), found


def plain_add_and_norm(x: jax.Array, parts: jax.Array | None, weight: jax.Array, *, eps: float, digits: bool = False):
    """`add_and_norm` by XLA."""
    total = x if parts is None else x + joined_parts(parts, x.dtype)
    normal = rms_norm(total, weight, eps)
    return total, normal, in_digits(normal.reshape(-1, normal.shape[-1])) if digits else None


def joined_parts(parts: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The sum of parts [P, ...], rounded to a dtype."""
    return parts[0].astype(dtype) if len(parts) == 1 else jnp.sum(parts, axis=0, dtype=jnp.float32).astype(dtype)


def suits(dtype: jnp.dtype, rows: int, width: int) -> bool:
    """Whether the kernel takes this dtype and these sizes."""
    return dtype == jnp.bfloat16 and rows <= MAX_ROWS and width % WIDTH == 0


def norm_row(row, x, parts, weight, inbox, normal, total, digits, *, eps: float, overlap: bool) -> None:
    """What a block of threads makes of a row: `normal[row]`, and `total[row]` and digits where there are such.

    With an inbox, other devices have parts too.
    """
    (M, D), dtype = x.shape, x.dtype
    layout = plgpu.Layout.WG_STRIDED((D,), AT_ONCE)

    def load(ref):
        return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

    def rounded(value):
        return value.astype(dtype).astype(jnp.float32)

    weight_D = load(weight)
    wait_for_earlier(overlap)
    sum_D = load(x.at[row])
    own = [] if parts is None else [load(parts.at[part, row]) for part in range(parts.shape[0])]
    start_next(overlap)
    if parts is not None:
        added_D = sum(own)
        if inbox is not None:
            number = inbox.rounds[row] + 1
            added_D = sum_over_devices(added_D.astype(dtype), inbox, row, number, layout)
        sum_D = rounded(sum_D + rounded(added_D))
        total[row] = sum_D.astype(dtype)
    normal_D = rounded(sum_D * lax.rsqrt(jnp.sum(sum_D * sum_D) * (1 / D) + eps))
    normal_D = rounded(normal_D * weight_D)
    normal[row] = normal_D.astype(dtype)
    if digits is not None:
        largest = jnp.max(jnp.abs(normal_D))
        number_D = jnp.round(normal_D * (LARGEST / jnp.where(largest > 0, largest, 1.0)))
        high_D = jnp.round(number_D * (1 / BASE))
        digits.values[row] = high_D.astype(jnp.int8)
        digits.values[M + row] = (number_D - BASE * high_D).astype(jnp.int8)
        digits.largest[row] = largest
    if inbox is not None:  # by now all threads have seen the last number, as they have summed the squares together
        inbox.rounds[row] = number


@kernel("eps", "digits")
def fused_add_and_norm(
    x_MD,
    parts_PMD,
    weight_D,
    inbox: Inbox | None = None,
    *,
    eps: float,
    digits: bool = False,
    interpret=False,
    overlap=False,
):
    """`add_and_norm` of few rows [M, D] on a Hopper GPU, or `add_and_norm_over`: a block of threads has a row."""
    (M, D), dtype = x_MD.shape, x_MD.dtype
    if overlap and inbox is not None:
        raise ValueError("kernels of several devices wait for each other and must not start early: some never ended")

    def body(*refs):
        norm_row(lax.axis_index("row"), *refs, eps=eps, overlap=overlap)

    rows_type = jax.ShapeDtypeStruct((M, D), dtype)
    digits_type = Digits(jax.ShapeDtypeStruct((2 * M, D), jnp.int8), jax.ShapeDtypeStruct((M,), jnp.float32))
    normal_MD, total_MD, found = plgpu.kernel(
        body,
        out_type=(rows_type, None if parts_PMD is None else rows_type, digits_type if digits else None),
        grid=(M,),
        grid_names=("row",),
        interpret=interpret,
    )(x_MD, parts_PMD, weight_D, inbox)
    return x_MD if total_MD is None else total_MD, normal_MD, found
