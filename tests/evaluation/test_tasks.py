import json

import pytest

from dmax_jax.data.stories import story
from dmax_jax.decoding.batch import Answer
from dmax_jax.errors import InputError
from dmax_jax.evaluation.tasks import Problem, load_problems, score

GSM8K = [
    {"question": "Clips?", "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 24"},
    {"question": "Dollars?", "answer": "500 * 2 = $<<500*2=1000>>1,000\n#### 1,000"},
]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_stories_of_the_test_split():
    problems = load_problems("stories", 5, seed=3)
    rows = [story(3, index, "test") for index in range(5)]
    assert [problem.question for problem in problems] == [row["question"] for row in rows]
    assert [problem.expected for problem in problems] == [int(row["answer"].split("####")[1]) for row in rows]
    assert load_problems("stories", 5, seed=4) != problems
    assert len(load_problems("stories")) == 1000


def test_a_file(tmp_path):
    path = write(tmp_path / "gsm8k.jsonl", GSM8K)
    assert load_problems(path) == [Problem(0, "Clips?", 24), Problem(1, "Dollars?", 1000)]
    assert load_problems(path, samples=1) == [Problem(0, "Clips?", 24)]
    assert len(load_problems(path, samples=9)) == 2


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Clips?", "answer": "twenty"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "#### 1"}]},
    ],
)
def test_a_row_without_reference_is_named(row, tmp_path):
    path = write(tmp_path / "set.jsonl", [GSM8K[0], row])
    with pytest.raises(InputError, match=r"set\.jsonl, sample 2: "):
        load_problems(path)


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [(("gsm8k",), "gsm8k"), (("absent.jsonl",), "absent"), (("stories", 0), "samples=0"), (("stories", 1, -1), "seed")],
)
def test_bad_requests(arguments, culprit):
    with pytest.raises(InputError, match=culprit):
        load_problems(*arguments)


@pytest.mark.parametrize(
    ("text", "extracted", "correct"), [("#### 24", 24, True), ("#### 42", 42, False), ("24", None, False)]
)
def test_score(text, extracted, correct):
    answer = Answer([1], [5, 6, 0, 0], generated_tokens=2, forwards=3, seconds=1.0, trace=None)
    sample = score(Problem(7, "Clips?", 24), answer, text)
    assert (sample.index, sample.extracted, sample.expected, sample.correct) == (7, extracted, 24, correct)
    assert (sample.generated_tokens, sample.forwards, sample.text) == (2, 3, text)
    assert sample.finished
    cut_off = Answer([1], [5, 6, 7, 8], generated_tokens=4, forwards=3, seconds=1.0, trace=None)
    assert not score(Problem(7, "Clips?", 24), cut_off, text).finished
