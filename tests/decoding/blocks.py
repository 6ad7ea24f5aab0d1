"""Hand-made blocks and logits for tests of single steps."""

import jax
import jax.numpy as jnp
import numpy as np

from dmax_jax.decoding.block import Block
from dmax_jax.decoding.generate import STEPS, read_logits

VOCABULARY, MASK, EOS = 12, 11, 10
TABLE = np.random.default_rng(0).normal(size=(VOCABULARY, 6)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(0), 1)


def embed(tokens):
    return jnp.asarray(TABLE)[tokens]


def make_block(tokens, active=None) -> Block:
    """A block of one row; `active` is by default what is masked. As it stands after a step, if `active` is wider."""
    tokens_BW = np.array([tokens], np.int32)
    active_BW = tokens_BW == MASK if active is None else np.array([active], bool)
    unsure_BW = np.zeros(tokens_BW.shape, np.float32)
    return Block(tokens_BW, active_BW, unsure_BW, np.zeros(1, np.int32))


@jax.jit
def step(block: Block, logits_BWV, policy, keys_B=KEYS) -> tuple[Block, jax.Array]:
    """The block after a step of the policy, and whether it stops."""
    block, prediction = read_logits(block, logits_BWV, keys_B, policy, MASK)
    return STEPS[type(policy)](block, prediction, policy, MASK)


def make_logits(tokens, confidences) -> np.ndarray:
    """Logits [1, W, V] under which each position predicts a token with a probability; the others share the rest."""
    confidences = np.array(confidences, np.float64)
    logits = np.repeat(np.log((1 - confidences) / (VOCABULARY - 1))[:, None], VOCABULARY, axis=1)
    logits[np.arange(len(tokens)), tokens] = np.log(confidences)
    return logits[None].astype(np.float32)
