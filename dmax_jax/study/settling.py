"""How blocks settle: how sure the model is at each forward of a block, and how many blocks still run."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dmax_jax.decoding.batch import Answer


@dataclasses.dataclass(frozen=True)
class Settling:
    """Means by the number of the forward in the block, from the first on, over the blocks that get that forward.

    The later a forward, the fewer and harder the blocks that it is of.
    """

    entropy: list[float]  # of the top-1 confidence p: -p log p - (1 - p) log(1 - p), in nats, over all but the prompt
    confidence: list[float]  # the top-1 confidence itself
    running: list[float]  # share of all blocks that get a forward of this number
    forwards_per_block: float
    unsettled: float  # share of the blocks that no stop rule ended


def measure_settling(answers: Sequence[Answer], block_length: int) -> Settling:
    """Sums up the traces of answers; a block counts from its first forward to its last."""
    W = block_length
    entropy_F, confidence_F, positions_F, blocks_F = np.zeros((4, W))
    unsettled = 0
    for answer in answers:
        for place, step in enumerate(answer.trace):
            first = max(0, len(answer.prompt_ids) - step.block * W)  # the prompt's tail is not decoded
            p = np.array(step.confidences[first:])
            surprise = np.where((p > 0) & (p < 1), -p * np.log(np.maximum(p, 1e-30)), 0)
            q = 1 - p
            surprise = surprise + np.where((q > 0) & (q < 1), -q * np.log(np.maximum(q, 1e-30)), 0)
            entropy_F[step.step] += surprise.sum()
            confidence_F[step.step] += p.sum()
            positions_F[step.step] += len(p)
            blocks_F[step.step] += 1
            last = place + 1 == len(answer.trace) or answer.trace[place + 1].block != step.block
            unsettled += last and not step.stop
    reached = blocks_F > 0
    return Settling(
        entropy=(entropy_F[reached] / positions_F[reached]).tolist(),
        confidence=(confidence_F[reached] / positions_F[reached]).tolist(),
        running=(blocks_F[reached] / blocks_F[0]).tolist(),
        forwards_per_block=float(blocks_F.sum() / blocks_F[0]),
        unsettled=float(unsettled / blocks_F[0]),
    )
