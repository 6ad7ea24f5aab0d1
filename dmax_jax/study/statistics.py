"""Figures with intervals: over problems, which all rows share, and over training seeds.

Intervals are 95 % percentile bootstraps. A replicate draws the problems anew, the same ones for every row, so that rows
are compared on equal terms, and for every row its seeds. A single seed's accuracy has Wilson's interval.
"""

import dataclasses
from typing import Any

import numpy as np

from dmax_jax.evaluation.metrics import area_under_parallelism, wilson_interval
from dmax_jax.study.plan import Study

REPLICATES = 1000
Interval = tuple[float, float]
Records = dict[str, list[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class PointSummary:
    """A row at one threshold, mean over seeds."""

    threshold: float
    accuracy: float
    accuracy_interval: Interval
    tpf_macro: float
    tpf_interval: Interval
    tpf_total: float
    forwards: float
    finished: float
    accuracy_by_seed: list[float]


@dataclasses.dataclass(frozen=True)
class RowSummary:
    name: str
    label: str
    seeds: int
    points: list[PointSummary]
    aup: float
    aup_interval: Interval
    aup_by_seed: list[float]
    aup_gain: float  # over the reference row
    aup_gain_interval: Interval
    fastest: PointSummary | None  # of the points at most one below the base's best accuracy

    def point(self, threshold: float) -> PointSummary:
        return next(point for point in self.points if point.threshold == threshold)


@dataclasses.dataclass(frozen=True)
class _Outcomes:
    """Per seed, threshold and problem: right or not (in percent), and tokens per forward."""

    accuracy_SPN: np.ndarray
    tpf_SPN: np.ndarray

    @classmethod
    def of(cls, records: list[dict[str, Any]]) -> "_Outcomes":
        def stack(name: str) -> np.ndarray:
            return np.array([[point[f"{name}_by_problem"] for point in record["points"]] for record in records])

        return cls(100.0 * stack("correct"), stack("generated_tokens") / (stack("forwards") + 1.0))


def summarize(study: Study, records: Records) -> dict[str, RowSummary]:
    """Summaries of all rows that have records, in the study's order."""
    rng = np.random.default_rng(0)
    outcomes = {name: _Outcomes.of(found) for name, found in records.items()}
    best = max(float(o.accuracy_SPN.mean(axis=(0, 2)).max()) for o in outcomes.values())
    base_best = base_best_point(study, records)
    N = next(iter(outcomes.values())).accuracy_SPN.shape[-1]
    weights_RN = rng.multinomial(N, np.full(N, 1 / N), size=REPLICATES) / N
    drawn = {name: _replicates(o, weights_RN) for name, o in outcomes.items()}
    aups = {name: _areas(acc_RSP, tpf_RSP, best) for name, (acc_RSP, tpf_RSP) in drawn.items()}
    reference = study.reference if study.reference in aups else next(iter(aups))
    seeds = {name: rng.integers(0, s, (REPLICATES, s)) for name, s in ((n, a.shape[1]) for n, a in aups.items())}
    mean_aup = {name: np.take_along_axis(aup, seeds[name], 1).mean(1) for name, aup in aups.items()}

    summaries = {}
    for row in study.rows:
        if row.name not in records:
            continue
        o, found = outcomes[row.name], records[row.name]
        own = _areas(o.accuracy_SPN.mean(2)[None], o.tpf_SPN.mean(2)[None], best)[0]
        other = outcomes[reference]
        own_reference = _areas(other.accuracy_SPN.mean(2)[None], other.tpf_SPN.mean(2)[None], best)[0]
        points = [
            _summarize_point(index, found, o, [x[:, :, index] for x in drawn[row.name]], seeds[row.name])
            for index in range(len(row.thresholds))
        ]
        near = [point for point in points if base_best is None or point.accuracy >= base_best[0] - 1]
        summaries[row.name] = RowSummary(
            name=row.name,
            label=row.label,
            seeds=len(found),
            points=points,
            aup=float(own.mean()),
            aup_interval=_percentiles(mean_aup[row.name]),
            aup_by_seed=own.tolist(),
            aup_gain=float(own.mean() - own_reference.mean()),
            aup_gain_interval=_percentiles(mean_aup[row.name] - mean_aup[reference]),
            fastest=max(near, key=lambda point: point.tpf_macro, default=None),
        )
    return summaries


def base_best_point(study: Study, records: Records) -> tuple[float, float] | None:
    """Accuracy and TPF of the study's baseline at its most accurate threshold."""
    found = records.get(study.baseline)
    if not found:
        return None
    return max((point["accuracy"], point["tpf_macro"]) for point in found[0]["points"])


def _replicates(outcomes: _Outcomes, weights_RN: np.ndarray) -> list[np.ndarray]:
    """Accuracy and TPF [R, S, P] over redrawn problems."""
    return [np.einsum("rn,spn->rsp", weights_RN, x, optimize=True) for x in (outcomes.accuracy_SPN, outcomes.tpf_SPN)]


def _areas(accuracy_RSP: np.ndarray, tpf_RSP: np.ndarray, best: float) -> np.ndarray:
    R, S, _ = accuracy_RSP.shape
    return np.array(
        [
            [area_under_parallelism(list(zip(tpf_RSP[r, s], accuracy_RSP[r, s], strict=True)), best) for s in range(S)]
            for r in range(R)
        ]
    )


def _summarize_point(index: int, found: list[dict], outcomes: _Outcomes, drawn_RS: list[np.ndarray], seeds_RS):
    points = [record["points"][index] for record in found]
    accuracy_R, tpf_R = (np.take_along_axis(x, seeds_RS, 1).mean(1) for x in drawn_RS)
    accuracy_SN = outcomes.accuracy_SPN[:, index]
    interval = _percentiles(accuracy_R)
    if len(found) == 1:
        low, high = wilson_interval(int(accuracy_SN.sum() / 100 + 0.5), accuracy_SN.shape[1])
        interval = (100 * low, 100 * high)

    def mean(name: str) -> float:
        return float(np.mean([point[name] for point in points]))

    return PointSummary(
        threshold=points[0]["threshold"],
        accuracy=mean("accuracy"),
        accuracy_interval=interval,
        tpf_macro=mean("tpf_macro"),
        tpf_interval=_percentiles(tpf_R),
        tpf_total=mean("tpf_total"),
        forwards=mean("forwards"),
        finished=mean("finished"),
        accuracy_by_seed=[point["accuracy"] for point in points],
    )


def _percentiles(values: np.ndarray) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
