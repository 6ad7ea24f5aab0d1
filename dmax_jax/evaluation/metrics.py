"""What an evaluation measures: accuracy, tokens per forward (TPF), tokens per second (TPS), AUP."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from dmax_jax.decoding.batch import Answer
from dmax_jax.evaluation.answers import Sample

Z_95 = 1.959964  # standard normal quantile of a two-sided 95 % interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metrics:
    """Figures of one run over a set; accuracies are in percent."""

    problems: int
    accuracy: float
    accuracy_low: float  # 95 % interval
    accuracy_high: float
    tpf_macro: float  # mean over samples of each one's TPF, as the official code reports
    tpf_total: float  # all tokens by all forwards
    forwards: float  # per sample, over blocks
    tps: float
    finished: float  # share of the answers that end, 0 to 1
    tokens: int
    seconds: float


def measure(samples: Sequence[Sample], seconds: float) -> Metrics:
    """Sums up samples that took `seconds` to decode; the prefill counts as one forward of each sample."""
    n, correct = len(samples), sum(sample.correct for sample in samples)
    tokens, forwards = (sum(getattr(s, name) for s in samples) for name in ("generated_tokens", "forwards"))
    low, high = wilson_interval(correct, n)
    return Metrics(
        problems=n,
        accuracy=100 * correct / n,
        accuracy_low=100 * low,
        accuracy_high=100 * high,
        tpf_macro=sum(sample.generated_tokens / (sample.forwards + 1) for sample in samples) / n,
        tpf_total=tokens / (forwards + n),
        forwards=forwards / n,
        tps=tokens / seconds,
        finished=sum(sample.finished for sample in samples) / n,
        tokens=tokens,
        seconds=seconds,
    )


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson's score interval, which holds for few trials and near 0 and 1)."""
    p, z2 = successes / trials, Z_95**2
    center = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(0.0, center - half), min(1.0, center + half)


def total_seconds(answers: Sequence[Answer], batch_size: int) -> float:
    """The time of all batches; every answer of a batch carries the time of the whole, which counts once."""
    return sum(answer.seconds for answer in answers[::batch_size])


def area_under_parallelism(points: Sequence[tuple[float, float]], best_accuracy: float = 0.0) -> float:
    """AUP: accuracy in percent integrated over TPF, where accuracy below the best counts exponentially less.

    `points` are (TPF, accuracy), one per threshold. `best_accuracy` is that of all methods compared; a better one among
    the points takes its place. Points more than 5 below the slowest one's accuracy are left out.
    """
    points = sorted(points)
    slowest_tpf, slowest_accuracy = points[0]
    best = max(best_accuracy, *(accuracy for _, accuracy in points))
    if best == 0:
        return 0.0
    kept = [(tpf, y * min(math.exp(-3 * (1 - y / best)), 1)) for tpf, y in points if y >= slowest_accuracy - 5]
    trapezoids = (0.5 * (r - r0) * (y + y0) for (r0, y0), (r, y) in itertools.pairwise(kept))
    return slowest_tpf * slowest_accuracy + sum(trapezoids)
