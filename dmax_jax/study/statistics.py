"""Figures with intervals: over problems, which all rows share, and over training seeds.

Intervals are 95 % percentile bootstraps. A replicate draws the problems anew, the same ones for every row, and the
seeds of every training, the same ones for all rows that decode its models. A single seed's accuracy has Wilson's
interval; its other intervals say nothing of training's own scatter, and those of a few seeds say too little of it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dmax_jax.evaluation.metrics import area_under_parallelism, wilson_interval
from dmax_jax.study.plan import Row, Study

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
    aup_gain: float | None  # over the reference row
    aup_gain_interval: Interval | None
    fastest: PointSummary | None  # of the points at most one below the baseline's best accuracy


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
    rows = [row for row in study.rows if row.name in records]
    outcomes = {row.name: _Outcomes.of(records[row.name]) for row in rows}
    N = next(iter(outcomes.values())).accuracy_SPN.shape[-1]
    weights_RN = rng.multinomial(N, np.full(N, 1 / N), size=REPLICATES) / N
    drawn = {name: _replicates(o, weights_RN) for name, o in outcomes.items()}
    observed = {name: _replicates(o, np.full((1, N), 1 / N)) for name, o in outcomes.items()}
    seeds = _draw_seeds(rows, records, rng)
    aups_RS, aup_1S = _areas(drawn), _areas(observed)
    aup_R = {name: np.take_along_axis(aup_RS, seeds[name], 1).mean(1) for name, aup_RS in aups_RS.items()}

    summaries = {}
    for row in rows:
        found = records[row.name]
        points = [
            _summarize_point(
                index, found, outcomes[row.name], [x[:, :, index] for x in drawn[row.name]], seeds[row.name]
            )
            for index in range(len(row.thresholds))
        ]
        gain = interval = None
        if study.reference in aup_R:
            gain = float(aup_1S[row.name].mean() - aup_1S[study.reference].mean())
            interval = _percentiles(aup_R[row.name] - aup_R[study.reference])
        summaries[row.name] = RowSummary(
            name=row.name,
            label=row.label,
            seeds=len(found),
            points=points,
            aup=float(aup_1S[row.name].mean()),
            aup_interval=_percentiles(aup_R[row.name]),
            aup_by_seed=aup_1S[row.name][0].tolist(),
            aup_gain=gain,
            aup_gain_interval=interval,
            fastest=None,
        )
    baseline = most_accurate(summaries[study.baseline]) if study.baseline in summaries else None
    return {name: dataclasses.replace(row, fastest=_fastest(row, baseline)) for name, row in summaries.items()}


def most_accurate(row: RowSummary) -> PointSummary:
    """Of equally accurate points the faster one."""
    return max(row.points, key=lambda point: (point.accuracy, point.tpf_macro))


def _fastest(row: RowSummary, baseline: PointSummary | None) -> PointSummary | None:
    near = [point for point in row.points if baseline and point.accuracy >= baseline.accuracy - 1]
    return max(near, key=lambda point: point.tpf_macro, default=None)


def _draw_seeds(rows: Sequence[Row], records: Records, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Seeds [R, S] of every row's replicates; rows of one training decode the same models, so they draw the same."""
    drawn: dict[tuple[str, int], np.ndarray] = {}
    for row in rows:
        count = len(records[row.name])
        if (row.training, count) not in drawn:
            drawn[row.training, count] = rng.integers(0, count, (REPLICATES, count))
    return {row.name: drawn[row.training, len(records[row.name])] for row in rows}


def _replicates(outcomes: _Outcomes, weights_RN: np.ndarray) -> list[np.ndarray]:
    """Accuracy and TPF [R, S, P] over redrawn problems."""
    return [np.einsum("rn,spn->rsp", weights_RN, x, optimize=True) for x in (outcomes.accuracy_SPN, outcomes.tpf_SPN)]


def _areas(drawn: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    """Areas under parallelism [R, S] of every row, under the best accuracy of all rows in the same replicate."""
    best_R = np.max([accuracy_RSP.max(axis=(1, 2)) for accuracy_RSP, _ in drawn.values()], axis=0)

    def areas(accuracy_RSP: np.ndarray, tpf_RSP: np.ndarray) -> np.ndarray:
        return np.array(
            [
                [
                    area_under_parallelism(list(zip(tpf_P, accuracy_P, strict=True)), best)
                    for tpf_P, accuracy_P in zip(tpf_SP, accuracy_SP, strict=True)
                ]
                for tpf_SP, accuracy_SP, best in zip(tpf_RSP, accuracy_RSP, best_R, strict=True)
            ]
        )

    return {name: areas(*pair) for name, pair in drawn.items()}


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
