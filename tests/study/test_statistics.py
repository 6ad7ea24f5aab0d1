import copy

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
    point = summaries["base"].point(0.9)
    right = sum(records["base"][0]["points"][0]["correct_by_problem"])
    np.testing.assert_allclose(point.accuracy_interval, 100 * np.array(wilson_interval(right, 200)))


def test_areas_are_those_of_the_metric_under_the_best_accuracy_of_all(records, summaries):
    best = max(point.accuracy for row in summaries.values() for point in row.points)
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
    same = {"base": records["base"], "spd": [copy.deepcopy(records["base"][0])] * 2}
    np.testing.assert_allclose(summarize(STUDY, same)["spd"].aup_gain_interval, (0, 0), atol=1e-9)


def test_the_fastest_point_is_within_one_point_of_the_baselines_best(summaries):
    best = summaries["base"].point(0.9).accuracy
    for row in summaries.values():
        near = [point for point in row.points if point.accuracy >= best - 1]
        assert row.fastest == max(near, key=lambda point: point.tpf_macro, default=None)
    assert summaries["base"].fastest.threshold == 0.9


def test_rows_without_records_are_left_out(records):
    assert list(summarize(STUDY, {"spd": records["spd"]})) == ["spd"]
