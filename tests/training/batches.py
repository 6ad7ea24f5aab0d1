"""A hand-made batch for the small model."""

import jax
import jax.numpy as jnp
import numpy as np

from dmax_jax.config import ObjectiveConfig
from dmax_jax.training.batch import Batch
from dmax_jax.training.objectives import Problem
from tests.models import SMALL

BLOCK, LENGTH, ROWS, PADDING = 4, 16, 4, 2
PROMPTS, TEXTS = [3, 4, 0, 9], [12, 16, 7, 10]  # end of the prompt, and of the text after which EOS stands


def make_batch() -> Batch:
    tokens = np.random.default_rng(0).integers(0, 45, (ROWS, LENGTH)).astype(np.int32)
    for row, end in enumerate(TEXTS):
        tokens[row, end:] = SMALL.eos_token_id
    batch = Batch(
        tokens_BT=tokens,
        prompt_length_B=np.array(PROMPTS, np.int32),
        index_B=np.array([5, 0, 7, 2], np.int32),
        epoch_B=np.array([0, 1, 0, 0], np.int32),
        on_policy_B=np.array([True, False, False, True]),
    )
    return jax.tree.map(jnp.asarray, batch)


def make_problem(dtype: str = "float32", **objective) -> Problem:
    settings = {"mask_rate_low": 0.5, "mask_rate_high": 0.8, "supervised_padding": PADDING} | objective
    return Problem(SMALL, ObjectiveConfig(**settings), BLOCK, dtype)
