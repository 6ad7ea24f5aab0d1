"""Results for people (a table) and for programs (JSON)."""

import dataclasses
import platform
from collections.abc import Sequence
from typing import Any

import jax
import jaxlib

import dmax_jax
from dmax_jax.evaluation.answers import Sample
from dmax_jax.evaluation.metrics import Metrics

COLUMNS = ("threshold", "accuracy % (95 %)", "TPF macro", "TPF total", "forwards", "TPS", "finished %")


@dataclasses.dataclass(frozen=True)
class Result:
    """One run over a set."""

    policy: dict[str, Any]
    metrics: Metrics
    samples: list[Sample]


def environment() -> dict[str, str]:
    """Versions, and the kind of device that this process computes on."""
    return {
        "dmax_jax": dmax_jax.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }


def to_json(settings: dict, results: Sequence[Result], aup: float | None) -> dict:
    """The machine-readable report: settings, environment, AUP of a sweep, and per run its figures and samples."""
    runs = [
        {"policy": result.policy}
        | dataclasses.asdict(result.metrics)
        | {"samples": [dataclasses.asdict(sample) for sample in result.samples]}
        for result in results
    ]
    return {"settings": settings, "environment": environment(), "aup": aup, "results": runs}


def table(results: Sequence[Result]) -> str:
    """One line per run under a line of titles, columns aligned."""
    lines = [COLUMNS, *(_cells(result.policy["threshold"], result.metrics) for result in results)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def _cells(threshold: float, metrics: Metrics) -> tuple[str, ...]:
    return (
        f"{threshold:g}",
        f"{metrics.accuracy:.1f} ({metrics.accuracy_low:.1f} to {metrics.accuracy_high:.1f})",
        f"{metrics.tpf_macro:.2f}",
        f"{metrics.tpf_total:.2f}",
        f"{metrics.forwards:.1f}",
        f"{metrics.tps:.1f}",
        f"{100 * metrics.finished:.1f}",
    )
