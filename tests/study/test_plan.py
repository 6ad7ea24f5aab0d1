import dataclasses
import pathlib

import pytest

from dmax_jax.config import ObjectiveConfig
from dmax_jax.decoding.policies import SpdPolicy
from dmax_jax.errors import InputError
from dmax_jax.study.plan import Row, Table, Training, load_study
from tests.study.small_study import make_study

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_the_shipped_study_is_whole():
    study = load_study(str(ROOT / "configs" / "study_small.py"))
    used = {row.training for row in study.rows}
    assert used == {"", *(training.name for training in study.trainings)}
    thresholds = {row.name: row.thresholds for row in study.rows}
    for table in study.tables:
        for name, threshold in table.points:
            assert threshold is None or threshold in thresholds[name], (table.title, name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "nothing"}, "no row 'nothing'"),
        ({"baseline": "nothing"}, "no row 'nothing'"),
        ({"curves": ("nothing",)}, "no row 'nothing'"),
        ({"tables": (Table(title="", points=(("nothing", 0.5),)),)}, "no row 'nothing'"),
        ({"tables": (Table(title="", points=(("spd", 0.7),)),)}, "row 'spd' at 0.7, which is none of its thresholds"),
        ({"settling_threshold": 0.7}, "row 'spd' does not settle at 0.7"),
        ({"trainings": ()}, "'spd' decodes an unknown training 'oput'"),
        ({"trainings": (Training(name="oput", objective=ObjectiveConfig()),) * 2}, "two trainings are called 'oput'"),
    ],
)
def test_a_plan_that_names_what_is_not_there_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make_study(**changes)


def test_two_rows_of_one_name_are_refused():
    study = make_study()
    with pytest.raises(InputError, match="two rows are called 'base'"):
        dataclasses.replace(study, rows=study.rows + study.rows[:1])


@pytest.mark.parametrize(("field", "value"), [("data", "onw"), ("seeds", 0)])
def test_a_training_of_nonsense_is_refused(field, value):
    with pytest.raises(InputError, match=f"training 'x' has {field}="):
        Training(**{"name": "x", "objective": ObjectiveConfig(), field: value})


def test_a_row_without_thresholds_is_refused():
    with pytest.raises(InputError, match="row 'x' has no thresholds"):
        Row(name="x", label="x", training="", policy=SpdPolicy(), thresholds=())


def test_a_file_that_is_no_study(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_study(str(tmp_path / "study.py"))
    (tmp_path / "study.py").write_text("def get_config(): pass")
    with pytest.raises(InputError, match=r"no get_study\(\)"):
        load_study(str(tmp_path / "study.py"))
