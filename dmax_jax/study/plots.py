"""The plots of a study. Needs matplotlib, which the extra `study` brings."""

import importlib.util
import pathlib
from typing import Any

from dmax_jax.errors import InputError
from dmax_jax.study.plan import Study
from dmax_jax.study.statistics import Records, RowSummary

# Okabe and Ito's colours, told apart by colour-blind readers, too; a marker each, for print.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#8A8A8A", "#56B4E9", "#6A51A3")
MARKERS = ("o", "s", "D", "P", "^", "v", "X", "*", "<")


def require_matplotlib() -> None:
    """Raises InputError if the plots can't be made, for a check before long work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError('plots need matplotlib: pip install ".[study]"')


def plot_curves(study: Study, summaries: dict[str, RowSummary], path: pathlib.Path) -> None:
    """Accuracy against tokens per forward, a curve per row from high thresholds to low, bars for the 95 % intervals."""
    figure, axes = _figure()
    for row in [summaries[name] for name in study.curves if name in summaries]:
        points = sorted(row.points, key=lambda point: -point.threshold)
        x, y = [p.tpf_macro for p in points], [p.accuracy for p in points]
        spread_y = _spread(y, [p.accuracy_interval for p in points])
        spread_x = _spread(x, [p.tpf_interval for p in points])
        style = _style(study, row.name) | {"markersize": 5, "linewidth": 1.6, "elinewidth": 0.9}
        axes.errorbar(x, y, spread_y, spread_x, label=row.label, **style)
    axes.set_xlabel("tokens per forward pass")
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(-3, 103)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.01), ncols=2, fontsize=8.5)
    _save(figure, path)


def plot_settling(study: Study, records: Records, threshold: float, path: pathlib.Path) -> bool:
    """How sure the model is in the blocks that still run, and how many do, forward by forward, of the first seed.

    Returns False if no row was traced.
    """
    traced = []
    for row in study.rows:
        for record in records.get(row.name, [])[:1]:
            found = [p["settling"] for p in record["points"] if "settling" in p and p["threshold"] == threshold]
            traced += [(row, settling) for settling in found]
    if not traced:
        return False
    figure, (left, right) = _figure(columns=2)
    for row, settling in traced:
        style = _style(study, row.name) | {"markersize": 3.5, "linewidth": 1.6}
        forwards = range(1, len(settling["running"]) + 1)
        left.plot(forwards, [100 * share for share in settling["running"]], label=row.label, **style)
        right.plot(forwards, settling["entropy"], **style)
    left.set_ylabel("blocks still running, %")
    right.set_ylabel("entropy of top-1 confidence, nats")
    for axes in (left, right):
        axes.set_xlabel("forward within the block")
        axes.set_ylim(bottom=0)
    # The figure's, not the left axes', which would be narrowed to make room for it.
    figure.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.05, 1), ncols=3, fontsize=8.5)
    _save(figure, path)
    return True


def _style(study: Study, name: str) -> dict[str, str]:
    """The same colour and marker for a row in every plot."""
    others = [row.name for row in sorted(study.rows, key=lambda row: not row.settling) if row.name not in study.curves]
    index = [*study.curves, *others].index(name)
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def _figure(columns: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = pyplot.subplots(1, columns, figsize=(7.2 if columns == 1 else 9.6, 4.6 if columns == 1 else 3.8))
    for each in [axes] if columns == 1 else axes:
        each.grid(color="#DDDDDD", linewidth=0.7)
        each.set_axisbelow(True)
    return figure, axes


def _spread(values: list[float], intervals: list[tuple[float, float]]) -> list[list[float]]:
    """Distances down and up to the ends of the intervals."""
    pairs = list(zip(values, intervals, strict=True))
    return [[max(v - low, 0) for v, (low, _) in pairs], [max(high - v, 0) for v, (_, high) in pairs]]


def _save(figure: Any, path: pathlib.Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=160, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
