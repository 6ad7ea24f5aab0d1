"""The plot of a sweep over batch sizes. Needs matplotlib, which the extra `study` brings."""

import pathlib
from typing import Any


def plot_batches(records: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Time of a forward, and tokens per second of all rows, against the number of rows, beside what reading allows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    records = sorted(records, key=lambda record: record["batch_size"])
    rows = [record["batch_size"] for record in records]
    limits = [record["limit_ms"] for record in records]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.plot(rows, [record["ms_per_forward"] for record in records], "o-", color="#0072B2", label="measured")
    left.plot(rows, limits, "s--", color="#8A8A8A", label="limit of the memory")
    left.set_ylabel("ms per forward of all rows")
    right.plot(rows, [record["tps"] for record in records], "o-", color="#0072B2")
    at_limit = [1e3 * r["tpf"] * r["batch_size"] / limit for r, limit in zip(records, limits, strict=True)]
    right.plot(rows, at_limit, "s--", color="#8A8A8A")
    right.set_ylabel("tokens per second of all rows")
    right.set_title(f"at {records[0]['tpf']:g} tokens per forward and row", fontsize=9)
    right.set_yscale("log")
    right.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    right.yaxis.set_minor_formatter(ticker.NullFormatter())
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(rows, [str(size) for size in rows])
        axes.set_xlabel("rows decoded together")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
