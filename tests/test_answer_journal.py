import json

import pytest

from dmax_jax.answer_journal import Journal, Outcome, read_outcomes, write_outcome
from dmax_jax.errors import InputError

OUTCOMES = [Outcome(answer, 3, 2, 0.5) for answer in ("a", None, "c\nä", "d", "e")]


@pytest.fixture
def journal(tmp_path) -> Journal:
    """The journal of 5 outcomes."""
    journal = Journal(tmp_path / "answers.jsonl", {"seed": 1, "threshold": 0.95, "method": "SpdPolicy"})
    assert journal.resume(8, 2) == []
    with journal.file.open("a") as file:
        for outcome in OUTCOMES:
            write_outcome(file, outcome)
    return journal


def test_a_run_goes_on_after_its_last_whole_batch(journal):
    assert read_outcomes(journal.file) == OUTCOMES
    assert journal.resume(8, 2) == OUTCOMES[:4]
    assert read_outcomes(journal.file) == OUTCOMES[:4]
    assert journal.resume(8, 3) == OUTCOMES[:3]


def test_the_last_batch_may_be_short(journal):
    assert journal.resume(5, 2) == OUTCOMES


@pytest.mark.parametrize("length", range(0, 300, 23))
def test_the_journal_may_end_anywhere(journal, length):
    whole = journal.file.read_bytes()
    journal.file.write_bytes(whole[:length])
    outcomes = journal.resume(8, 1)
    assert outcomes == OUTCOMES[: whole[:length].count(b"\n")]
    with journal.file.open("a") as file:
        write_outcome(file, OUTCOMES[-1])
    assert read_outcomes(journal.file) == [*outcomes, OUTCOMES[-1]]


@pytest.mark.parametrize("damage", [b"\0\0\0\n", b"5\n", b"{}\n", b"\xff\n"])
def test_what_follows_a_damaged_line_is_done_again(journal, damage):
    lines = journal.file.read_bytes().splitlines(keepends=True)
    journal.file.write_bytes(b"".join([*lines[:2], damage, *lines[2:]]))
    assert journal.resume(8, 1) == OUTCOMES[:2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, "made with seed=1, this run has 2: use the same settings, choose another --output, or remove"),
        ({"threshold": 0.9}, "made with threshold=0.95, this run has 0.9"),
        ({"low_threshold": 0.2}, "made with low_threshold=None, this run has 0.2"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_touched(journal, changes, message):
    before = journal.file.read_bytes()
    other = Journal(journal.output, journal.settings | changes)
    for batch_size in (2, 100):
        with pytest.raises(InputError, match=message):
            other.resume(8, batch_size)
    assert journal.file.read_bytes() == before
    assert journal.resume(8, 1) == OUTCOMES


def test_a_setting_that_is_gone_is_another_one(journal):
    other = Journal(journal.output, {"seed": 1, "method": "SpdPolicy"})
    with pytest.raises(InputError, match=r"threshold=0\.95, this run has None"):
        other.resume(8, 2)


def test_nothing_answered_nothing_to_protect(journal):
    journal.file.write_bytes(b'{"answ')
    other = Journal(journal.output, {"seed": 2})
    assert other.resume(8, 2) == []
    assert journal.file.read_bytes() == b""
    journal.output.touch()
    with pytest.raises(InputError, match="seed=2"):
        journal.close()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_answers_of_unknown_settings_are_refused(journal, text):
    journal.record.write_text(text)
    with pytest.raises(InputError, match=r"no answers\.jsonl\.run\.json that says what made them: choose another"):
        journal.resume(8, 2)
    journal.record.unlink()
    with pytest.raises(InputError, match=r"no answers\.jsonl\.run\.json that says"):
        journal.resume(8, 2)


def test_closing_leaves_output_and_record(journal):
    with pytest.raises(InputError, match=r"not of the run that answers\.jsonl\.run\.json is of"):
        journal.close()
    journal.write_record({"kept": 4})
    journal.output.touch()
    for _ in range(2):
        assert journal.close() == {"kept": 4}
    assert sorted(path.name for path in journal.output.parent.iterdir()) == ["answers.jsonl", "answers.jsonl.run.json"]
    assert json.loads(journal.record.read_text()) == {"settings": journal.settings, "figures": {"kept": 4}}
