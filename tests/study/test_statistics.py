import copy
import dataclasses

import numpy as np
import pytest

from dmax_jax.evaluation.metrics import area_under_parallelism, wilson_interval
from dmax_jax.study.statistics import summarize
from tests.study.small_study import make_records, make_study

STUDY = make_study()


@pytest.fixture(scope="module")
def records():
    return make_records(STUDY)


@pytest.fixture(scope="module")
def summaries(records):
    return summarize(STUDY, records)


def test_figures_are_means_over_seeds(records, summaries):
    row = summaries["spd"]
    first, second = ([point["accuracy"] for point in record["points"]] for record in records["spd"])
    assert row.seeds == 2
    for index, point in enumerate(row.points):
        assert point.accuracy_by_seed == [first[index], second[index]]
        np.testing.assert_allclose(point.accuracy, (first[index] + second[index]) / 2)
        low, high = point.accuracy_interval
        assert low < point.accuracy < high
        assert 2 < high - low < 16
        assert point.tpf_interval[0] < point.tpf_macro < point.tpf_interval[1]


def test_a_single_seed_has_wilsons_interval(records, summaries):
    point = summaries["base"].points[0]
    right = sum(records["base"][0]["points"][0]["correct_by_problem"])
    np.testing.assert_allclose(point.accuracy_interval, 100 * np.array(wilson_interval(right, 200)))


def test_areas_are_those_of_the_metric_under_the_best_accuracy_of_all(records, summaries):
    best = max(point["accuracy"] for found in records.values() for record in found for point in record["points"])
    for name, found in records.items():
        expected = [
            area_under_parallelism([(p["tpf_macro"], p["accuracy"]) for p in record["points"]], best)
            for record in found
        ]
        np.testing.assert_allclose(summaries[name].aup_by_seed, expected)
        np.testing.assert_allclose(summaries[name].aup, np.mean(expected))
        low, high = summaries[name].aup_interval
        assert low < summaries[name].aup < high


def test_gains_are_over_the_reference_on_the_same_problems(records, summaries):
    assert summaries["base"].aup_gain == 0
    assert summaries["base"].aup_gain_interval == (0, 0)
    row = summaries["spd"]
    np.testing.assert_allclose(row.aup_gain, row.aup - summaries["base"].aup)
    assert row.aup_gain_interval[0] > 0  # far better


def test_rows_of_one_training_share_seeds_and_problems(records):
    """Else a row would differ from its own copy by the scatter of the seeds."""
    row = STUDY.rows[1]
    rows = (*STUDY.rows, dataclasses.replace(row, name="copy"))
    study = dataclasses.replace(STUDY, rows=rows, reference="spd")
    found = summarize(study, records | {"copy": records["spd"]})["copy"]
    assert len(set(found.aup_by_seed)) == 2
    assert (found.aup_gain, found.aup_gain_interval) == (0, (0, 0))


def test_the_fastest_point_is_within_one_point_of_the_baselines_best(records):
    """80 % at 1.6 and 76 % at 7 tokens per forward, made exact."""
    exact = copy.deepcopy(records)
    for name, rights in (("base", (160, 40)), ("spd", (158, 152))):
        for record in exact[name]:
            for point, right in zip(record["points"], rights, strict=True):
                point["correct_by_problem"] = [1] * right + [0] * (200 - right)
                point["accuracy"] = right / 2
    found = summarize(STUDY, exact)
    assert [found[name].fastest.threshold for name in ("base", "spd")] == [0.9, 0.9]
    for record in exact["spd"]:  # 79 % is near enough
        record["points"][1] |= {"correct_by_problem": [1] * 158 + [0] * 42, "accuracy": 79.0}
        record["points"][0] |= {"correct_by_problem": [1] * 157 + [0] * 43, "accuracy": 78.5}
    assert summarize(STUDY, exact)["spd"].fastest.threshold == 0.5
    assert summarize(STUDY, {"spd": exact["spd"]})["spd"].fastest is None  # no baseline


def test_rows_without_records_are_left_out(records):
    found = summarize(STUDY, {"spd": records["spd"]})
    assert list(found) == ["spd"]
    assert found["spd"].aup_gain is None  # the reference is not there
