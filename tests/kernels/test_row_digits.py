import jax.numpy as jnp
import numpy as np

from dmax_jax.kernels.row_digits import LARGEST, in_digits, joined

ROWS, COLUMNS = 5, 2048


def test_products_of_digits_are_those_of_the_rows_to_half_a_step():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(ROWS, COLUMNS))
    x[1] = 3  # with weights of 127, 128 times the sum of the high digits is too large for an int32
    x[2] = 0
    x[3, 7] = -50
    x = jnp.asarray(x, jnp.bfloat16)
    weights = draw.integers(-127, 128, (64, COLUMNS))
    weights[0] = 127
    digits = in_digits(x)
    assert digits.values.dtype == jnp.int8
    assert digits.values.min() >= -127
    sums = jnp.asarray(weights, jnp.int32) @ digits.values.astype(jnp.int32).T
    x = np.asarray(x, np.float64)
    error = np.abs(joined(sums, digits.largest) - weights @ x.T)
    half_step = np.abs(x).max(axis=1) / LARGEST / 2
    assert (error <= 6 * half_step * np.sqrt(COLUMNS) * 127 * 0.58).all()  # six standard deviations
    back = np.asarray(digits.values, np.float64).reshape(2, ROWS, COLUMNS)
    back = (128 * back[0] + back[1]) * np.asarray(digits.largest)[:, None] / LARGEST
    assert (np.abs(back - x) <= 1.001 * half_step[:, None]).all()


def test_what_is_not_finite_stays_so():
    digits = in_digits(jnp.array([[jnp.nan, 1], [jnp.inf, 1], [2, 1]], jnp.bfloat16))
    sums = digits.values.astype(jnp.int32).sum(axis=1)[None]
    assert np.isfinite(joined(sums, digits.largest)).tolist() == [[False, False, True]]
