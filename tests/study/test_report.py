import csv
import importlib.util
import json

import pytest

from dmax_jax.errors import InputError
from dmax_jax.study import plots
from dmax_jax.study.report import write_report
from tests.study.small_study import make_records, make_study

SETTLING = {"entropy": [0.3, 0.2], "confidence": [0.5, 0.6], "running": [1.0, 0.5]}


def test_the_report_has_every_point_in_every_form(tmp_path):
    study = make_study()
    records = make_records(study)
    records["spd"][0]["points"][1]["settling"] = SETTLING | {"forwards_per_block": 1.5, "unsettled": 0.0}
    files = write_report(study, records, tmp_path / "report")
    assert [file.name for file in files] == [
        "study.json", "points.csv", "tables.md", "accuracy_tpf.png", "settling.png",
    ]  # fmt: skip
    found = json.loads(files[0].read_text())
    assert found["rows"]["spd"]["seeds"] == 2
    assert "correct_by_problem" not in files[0].read_text()
    assert found["records"]["spd"][0]["plan"]["training"]["steps"] is None

    lines = list(csv.DictReader(files[1].read_text().splitlines()))
    assert [(line["row"], float(line["threshold"])) for line in lines] == [
        ("base", 0.9), ("base", 0.0), ("spd", 0.9), ("spd", 0.5),
    ]  # fmt: skip
    assert float(lines[2]["accuracy"]) == pytest.approx(found["rows"]["spd"]["points"][0]["accuracy"], abs=1e-4)

    table = files[2].read_text()
    point = found["rows"]["base"]["points"][0]
    assert f"| base | 0.9 | {point['accuracy']:.1f} (" in table
    assert table.count("| SPD |") == 3  # two thresholds, and the areas
    assert "| base | " in table.split("## Area under parallelism")[1]
    for file in files[3:]:
        assert file.read_bytes().startswith(b"\x89PNG")


def test_a_part_of_the_records_gives_a_report(tmp_path):
    study = make_study()
    records = make_records(study)
    files = write_report(study, {"spd": records["spd"]}, tmp_path)
    assert [file.name for file in files][-1] == "accuracy_tpf.png"  # nothing was traced
    assert "| base |" not in files[2].read_text()


def test_matplotlib_is_asked_for_by_name(monkeypatch):
    plots.require_matplotlib()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="need matplotlib: pip install"):
        plots.require_matplotlib()
