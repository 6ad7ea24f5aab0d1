import math

import numpy as np

from dmax_jax.decoding.batch import Answer, Step
from dmax_jax.study.settling import measure_settling


def answer(prompt_length: int, steps: list[Step]) -> Answer:
    return Answer([1] * prompt_length, [2] * 8, generated_tokens=8, forwards=len(steps), seconds=1.0, trace=steps)


def test_means_by_forward_over_all_blocks():
    first = answer(
        4,
        [
            Step(2, 0, [5, 5], False, [0.5, 1.0]),
            Step(2, 1, [5, 5], True, [0.9, 0.8]),
            Step(3, 0, [5, 5], True, [1.0, 1.0]),
        ],
    )
    # Its prompt ends inside the block.
    second = answer(5, [Step(2, 0, [5, 5], False, [0.1, 0.6]), Step(2, 1, [5, 5], False, [0.2, 0.7])])
    found = measure_settling([first, second], block_length=2)
    np.testing.assert_allclose(found.confidence, [(0.5 + 1 + 1 + 1 + 0.6) / 5, (0.9 + 0.8 + 0.7) / 3])
    np.testing.assert_allclose(found.running, [1, 2 / 3])
    assert math.isclose(found.forwards_per_block, 5 / 3)
    assert math.isclose(found.unsettled, 1 / 3)  # the second answer's block ran out of forwards

    def entropy(p: float) -> float:
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    expected = [(entropy(0.5) + entropy(0.6)) / 5, (entropy(0.9) + entropy(0.8) + entropy(0.7)) / 3]
    np.testing.assert_allclose(found.entropy, expected)
