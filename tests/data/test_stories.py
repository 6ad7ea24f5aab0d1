import operator
import random
import re

import pytest

from dmax_jax.data import stories
from dmax_jax.data.stories import draw_core, split_of, story, tell
from dmax_jax.data.story_families import FAMILIES
from dmax_jax.data.tasks import get_task
from dmax_jax.errors import InputError

# A change of the generator changes what published numbers were measured on.
PINNED = {
    "question": "Tom has 11 shells and Emma has 17. All their shells are spread evenly over 4 plates. "
    "How many shells does one plate hold?",
    "answer": "We can work this out step by step. The two own 28 shells, because 11 + 17 = 28. "
    "With this we know enough for the next part. Split 4 ways, 28 shells come to 7 each, since 28 / 4 = 7. "
    "Now we know the answer, and it is 7.\n#### 7",
}
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def test_every_equation_holds_and_the_last_result_is_the_answer():
    for index in range(2000):
        answer = story(3, index, "train")["answer"]
        equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", answer)
        assert 2 <= len(equations) <= 3
        for x, op, y, result in equations:
            assert OPERATORS[op](int(x), int(y)) == int(result) >= 2
        assert answer.endswith(f"\n#### {equations[-1][3]}")


def test_text_has_no_open_placeholder_no_singular_amount_and_a_bounded_length():
    for index in range(1000):
        row = story(4, index, "test")
        text = row["question"] + row["answer"]
        assert not re.search(r"[{}]|\b[01] [a-z]|\b\d{3}", text)
        assert len(row["question"].split()) <= 60


def test_splits_share_no_core():
    cores = {split: set() for split in ("train", "test")}
    rng = random.Random(0)
    for split, seen in cores.items():
        for _ in range(2500):
            core = draw_core(rng, split)
            seen.add((core.family.name, tuple(core.values.values())))
    assert len(cores["train"]) > 1500
    assert len(cores["test"]) > 250
    assert cores["train"].isdisjoint(cores["test"])


def test_children_who_change_places_stay_in_their_split():
    family = next(family for family in FAMILIES if family.name == "together")
    for a in range(2, 10):
        here = split_of(family, {"a": a, "b": 3, "c": 5, "d": 7})
        assert here == split_of(family, {"a": 5, "b": 7, "c": a, "d": 3})


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_one_core_has_many_answers(family, monkeypatch):
    monkeypatch.setattr(stories, "NAMES", ("Tom", "Anna"))
    monkeypatch.setattr(stories, "NOUNS", ("pens",))
    monkeypatch.setattr(stories, "BAGS", (("bag", "bags"),))
    rng = random.Random(0)
    core = next(core for core in iter(lambda: draw_core(rng, "train"), None) if core.family is family)
    answers = {tell(random.Random(seed), core)["answer"] for seed in range(1000)}
    assert len(answers) > 2 * 20  # twice, as the two names change places


def test_independent_steps_come_in_either_order():
    rng = random.Random(1)
    core = next(core for core in iter(lambda: draw_core(rng, "train"), None) if core.family.name == "swap")
    values = core.values
    first = [tell(random.Random(seed), core)["answer"].find(f"= {values['r']}") for seed in range(50)]
    second = [tell(random.Random(seed), core)["answer"].find(f"= {values['p']}") for seed in range(50)]
    orders = {x < y for x, y in zip(first, second, strict=True)}
    assert orders == {True, False}


def test_a_story_is_a_function_of_its_arguments():
    assert story(1, 2, "train") == story(1, 2, "train")
    rows = [story(seed, index, split) for seed in (0, 1) for index in (0, 1) for split in ("train", "test")]
    assert len({str(row) for row in rows}) == 8
    assert story(0, 0, "test") == PINNED


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="valid"):
        story(0, 0, "valid")
    with pytest.raises(InputError, match="known tasks: stories"):
        get_task("story")
