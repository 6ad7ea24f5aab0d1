"""The report of a study: JSON and CSV for programs, tables in Markdown and plots for readers."""

import csv
import dataclasses
import pathlib
from collections.abc import Iterable

from dmax_jax.output_file import whole_file, write_json
from dmax_jax.study.plan import Study
from dmax_jax.study.plots import plot_curves, plot_settling
from dmax_jax.study.statistics import PointSummary, Records, RowSummary, most_accurate, summarize

Summaries = dict[str, RowSummary]


def write_report(study: Study, records: Records, directory: pathlib.Path) -> list[pathlib.Path]:
    """Writes the whole report of what has been measured; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    summaries = summarize(study, records)
    write_json(directory / "study.json", to_json(study, records, summaries), indent=1)
    write_csv(directory / "points.csv", summaries)
    with whole_file(directory / "tables.md") as file:
        file.write(to_markdown(study, summaries))
    plot_curves(study, summaries, directory / "accuracy_tpf.png")
    names = ["study.json", "points.csv", "tables.md", "accuracy_tpf.png"]
    if plot_settling(study, records, study.settling_threshold, directory / "settling.png"):
        names.append("settling.png")
    return [directory / name for name in names]


def to_json(study: Study, records: Records, summaries: Summaries) -> dict:
    """Every row's summary, and how each was made and measured (without the outcomes by problem)."""

    def without_problems(record: dict) -> dict:
        points = [{k: v for k, v in point.items() if not k.endswith("_by_problem")} for point in record["points"]]
        return record | {"points": points}

    return {
        "reference": study.reference,
        "baseline": study.baseline,
        "rows": {name: dataclasses.asdict(summary) for name, summary in summaries.items()},
        "records": {name: [without_problems(record) for record in found] for name, found in records.items()},
    }


def write_csv(path: pathlib.Path, summaries: Summaries) -> None:
    """A line per row and threshold."""
    columns = ("row", "label", "seeds", "threshold", "accuracy", "accuracy_low", "accuracy_high", "tpf_macro")
    columns += ("tpf_low", "tpf_high", "tpf_total", "forwards", "finished", "aup", "aup_low", "aup_high")
    with whole_file(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in summaries.values():
            for p in row.points:
                figures = (p.accuracy, *p.accuracy_interval, p.tpf_macro, *p.tpf_interval, p.tpf_total, p.forwards)
                figures += (p.finished, row.aup, *row.aup_interval)
                writer.writerow([row.name, row.label, row.seeds, p.threshold, *(f"{f:.4f}" for f in figures)])


def to_markdown(study: Study, summaries: Summaries) -> str:
    """The study's tables, then every row with its area under parallelism."""
    parts = []
    for table in study.tables:
        lines = [
            point_line(summaries[name], point)
            for name, threshold in table.points
            if name in summaries
            for point in summaries[name].points
            if threshold is None or point.threshold == threshold
        ]
        header = ("training, decoding", "threshold", "accuracy % (95 %)", "TPF (95 %)", "forwards", "seeds")
        parts.append(f"## {table.title}\n\n{markdown_table(header, lines)}")
    return "\n\n".join([*parts, aup_table(study, summaries)]) + "\n"


def point_line(row: RowSummary, point: PointSummary) -> tuple[str, ...]:
    return (
        row.label,
        f"{point.threshold:g}",
        f"{point.accuracy:.1f} ({point.accuracy_interval[0]:.1f} to {point.accuracy_interval[1]:.1f})",
        f"{point.tpf_macro:.2f} ({point.tpf_interval[0]:.2f} to {point.tpf_interval[1]:.2f})",
        f"{point.forwards:.1f}",
        str(row.seeds),
    )


def aup_table(study: Study, summaries: Summaries) -> str:
    """All rows by area under parallelism, and how fast each is within one point of the baseline's best accuracy."""
    baseline = most_accurate(summaries[study.baseline]) if study.baseline in summaries else None
    lines = []
    for row in sorted(summaries.values(), key=lambda row: -row.aup):
        fastest = "-"
        if baseline and row.fastest:
            ratio = row.fastest.tpf_macro / baseline.tpf_macro
            fastest = f"{row.fastest.tpf_macro:.2f} at {row.fastest.threshold:g} ({ratio:.2f} times)"
        gain = "reference" if row.name == study.reference else "-"
        if row.aup_gain is not None and row.name != study.reference:
            gain = f"{row.aup_gain:+.0f} ({row.aup_gain_interval[0]:+.0f} to {row.aup_gain_interval[1]:+.0f})"
        aup = f"{row.aup:.0f} ({row.aup_interval[0]:.0f} to {row.aup_interval[1]:.0f})"
        lines.append((row.label, aup, gain, fastest, str(row.seeds)))
    label = summaries[study.reference].label if study.reference in summaries else "the reference"
    header = ("training, decoding", "AUP (95 %)", f"gain over {label} (95 %)", "TPF within one point", "seeds")
    notes = "Intervals of rows with one seed are over problems alone; several seeds are drawn anew, too."
    if baseline:
        notes += (
            f" 'Within one point' is of {summaries[study.baseline].label} at {baseline.threshold:g} "
            f"({baseline.accuracy:.1f} % at {baseline.tpf_macro:.2f}), which the times are of, too."
        )
    return f"## Area under parallelism\n\n{notes}\n\n{markdown_table(header, lines)}"


def markdown_table(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    rows = [tuple(header), *map(tuple, lines)]
    rows.insert(1, ("---",) * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
