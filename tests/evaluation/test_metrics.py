import dataclasses
import math

import pytest

from dmax_jax.decoding.batch import Answer
from dmax_jax.evaluation.answers import Sample
from dmax_jax.evaluation.metrics import area_under_parallelism, measure, total_seconds, wilson_interval


def sample(index: int, correct: bool, tokens: int, forwards: int, finished: bool = True) -> Sample:
    return Sample(
        index=index,
        correct=correct,
        extracted=None,
        expected=1,
        finished=finished,
        generated_tokens=tokens,
        forwards=forwards,
        text="",
    )


def test_figures_of_a_run():
    samples = [sample(0, True, 10, 4), sample(1, False, 30, 4), sample(2, True, 0, 9), sample(3, True, 60, 19, False)]
    metrics = measure(samples, seconds=5.0)
    low, high = wilson_interval(3, 4)
    assert dataclasses.asdict(metrics) == {
        "problems": 4,
        "accuracy": 75.0,
        "accuracy_low": 100 * low,
        "accuracy_high": 100 * high,
        "tpf_macro": (2 + 6 + 0 + 3) / 4,
        "tpf_total": 100 / 40,
        "forwards": 9.0,
        "tps": 20.0,
        "finished": 0.75,
        "tokens": 100,
        "seconds": 5.0,
    }


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe (1998), table I, method 3 (the score interval without continuity correction).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_against_published_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(trials - successes, trials) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_the_seconds_of_a_batch_count_once():
    seconds = [2.0, 2.0, 2.0, 3.0, 3.0, 3.0, 0.5]
    answers = [Answer([1], [2], generated_tokens=1, forwards=1, seconds=s, trace=None) for s in seconds]
    assert total_seconds(answers, batch_size=3) == 5.5
    assert total_seconds(answers[:2], batch_size=3) == 2.0


def test_aup_by_hand():
    # Sorted by TPF: (2, 80), (4, 75), (6, 60); 60 is below 80 - 5 and goes. The best is 80: W(75) = exp(-3/16).
    points = [(6.0, 60.0), (2.0, 80.0), (4.0, 75.0)]
    expected = 2 * 80 + 0.5 * (4 - 2) * (75 * math.exp(-3 / 16) + 80)
    assert expected == pytest.approx(302.1772, abs=1e-4)
    assert area_under_parallelism(points) == pytest.approx(expected)


def test_aup_counts_less_where_another_method_is_better():
    # The best is another method's 100: W(80) = exp(-0.6), W(90) = exp(-0.3); the first rectangle isn't weighted.
    expected = 2 * 80 + 0.5 * 1 * (90 * math.exp(-0.3) + 80 * math.exp(-0.6))
    assert area_under_parallelism([(2.0, 80.0), (3.0, 90.0)], best_accuracy=100.0) == pytest.approx(expected)
    assert area_under_parallelism([(2.0, 80.0), (3.0, 90.0)], best_accuracy=50.0) == pytest.approx(
        2 * 80 + 0.5 * (90 + 80 * math.exp(-3 / 9))  # a best below the points' own is theirs
    )


def test_aup_of_a_point_and_of_failure():
    assert area_under_parallelism([(3.0, 50.0)]) == 150.0
    assert area_under_parallelism([(3.0, 0.0), (4.0, 0.0)]) == 0.0
