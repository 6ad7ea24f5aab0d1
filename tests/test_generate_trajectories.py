import json
import re

import pytest

from dmax_jax import command, trajectories
from dmax_jax import generate_trajectories as generate
from dmax_jax.data.stories import story
from dmax_jax.kernels.quantised_weight import KINDS
from tests.evaluation.random_model import write_random_model

SHORT = ("--threshold=0", "--gen_length=8", "--block_length=8", "--batch_size=2", "--temperature=1")


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch, tmp_path):
    """Keeps the command from writing into the user's cache; JAX itself has read the variable before."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return f"--checkpoint={write_random_model(tmp_path_factory.mktemp('random') / 'model')}"


@pytest.fixture
def arguments(checkpoint, tmp_path) -> list[str]:
    """Five questions of equal length, so that there is one program to compile."""
    rows = [{"question": f"{number} pens?"} for number in range(5)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [checkpoint, *SHORT, f"--prompts_file={tmp_path / 'questions.jsonl'}", f"--output={tmp_path / 'a.jsonl'}"]


@pytest.fixture
def ending(monkeypatch):
    """Makes every answer end, which those of random weights hardly ever do: the last token stands for the end."""
    decode = trajectories.decode_prompts

    def cut(answer):
        object.__setattr__(answer, "generated_tokens", len(answer.token_ids) - 1)
        return answer

    monkeypatch.setattr(trajectories, "decode_prompts", lambda *args, **rest: map(cut, decode(*args, **rest)))


def run(*arguments) -> None:
    command.run(generate.main, generate.FLAGS, generate.__doc__, ["generate_trajectories", *map(str, arguments)])


def error_of(capsys, *arguments, code: int = 2) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == code
    screen = capsys.readouterr()
    assert screen.out == ""
    assert code != 2 or screen.err.count("\n") == 1
    return screen.err


def test_file_figures_and_progress(arguments, ending, tmp_path, capsys):
    run(*arguments)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == [f"{number} pens?" for number in range(5)]
    assert all(row.keys() == {"question", "answer"} and row["answer"] for row in rows)
    screen = capsys.readouterr()
    figures = r"5 answers of 5 questions \(0 unfinished\), \d+ tokens, [\d.]+ tokens/s \(TPS\), [\d.]+ tokens per"
    assert re.fullmatch(rf"{tmp_path}/a\.jsonl: {figures} forward \(TPF\)\n", screen.out)
    assert re.search(r"5/5 .*\d tokens/s", screen.err)
    before = (tmp_path / "a.jsonl").stat().st_mtime_ns
    run(*arguments)
    again = capsys.readouterr()
    assert again.out == screen.out.replace("a.jsonl:", "a.jsonl was complete already:")
    assert again.err == ""
    assert (tmp_path / "a.jsonl").stat().st_mtime_ns == before
    assert "seed=0, this run has 1: use the same settings" in error_of(capsys, *arguments, "--seed=1")


def test_interrupted_refused_with_other_flags_and_resumed(arguments, ending, tmp_path, capsys, monkeypatch):
    run(*arguments, f"--output={tmp_path / 'straight.jsonl'}")
    decode, calls = trajectories.decode_prompts, []

    def interrupted(*args, **rest):
        for number, answer in enumerate(decode(*args, **rest)):
            if number == 3:
                raise KeyboardInterrupt
            yield answer

    def counted(*args, **rest):
        calls.append(rest["first_index"])
        return decode(*args, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(trajectories, "decode_prompts", interrupted)
        assert "interrupted" in error_of(capsys, *arguments, code=130)
    assert not (tmp_path / "a.jsonl").exists()
    assert "threshold=0.0, this run has 0.5" in error_of(capsys, *arguments, "--threshold=0.5")
    monkeypatch.setattr(trajectories, "decode_prompts", counted)
    run(*arguments)
    assert calls == [2]
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "straight.jsonl").read_bytes()


def test_8_bit_weights_are_other_weights(arguments, ending, tmp_path, capsys):
    run(*arguments)
    for kind in KINDS:
        assert "weights_digest" in error_of(capsys, *arguments, f"--weights={kind}")
    run(*arguments, "--weights=int8", f"--output={tmp_path / 'int8.jsonl'}")
    assert (tmp_path / "int8.jsonl").read_text().count("\n") == 5


def test_shards(arguments, ending, tmp_path, capsys):
    for shard in ("0/2", "1/2", "0/1"):
        run(*arguments, f"--shard={shard}")
    first, second = (tmp_path / f"a-0000{index}-of-00002.jsonl" for index in (0, 1))
    assert (first.read_text() + second.read_text()).count("\n") == 5
    assert (first.read_text() + second.read_text()) == (tmp_path / "a.jsonl").read_text()
    assert str(second) in capsys.readouterr().out


def test_the_questions_of_a_task(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(generate.DECODING, "load", lambda: None)

    def write(model, rows, *_, **__):
        asked.extend(rows)
        return trajectories.Summary(questions=3, kept=3, tokens=0, seconds=0.0, tpf=0.0)

    monkeypatch.setattr(generate, "write_trajectories", write)
    run("--task=stories", "--samples=3", "--data_seed=7", f"--output={tmp_path / 'a.jsonl'}")
    assert asked == [story(7, index, "train") for index in range(3)]


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        ("", "exactly one of --prompts_file and --task"),
        ("--task=stories --prompts_file=a.jsonl", "exactly one of"),
        ("--task=absent", "task 'absent' is unknown"),
        ("--task=stories --samples=0", "--samples=0"),
        ("--prompts_file=absent.jsonl", "absent.jsonl: no such file"),
        ("--prompts_file=absent*.jsonl", "absent*.jsonl: no file matches"),
        ("--task=stories --shard=4/4", "--shard=4/4: write INDEX/COUNT"),
        ("--task=stories --shard=-1/4", "--shard=-1/4"),
        ("--task=stories --shard=1", "--shard=1:"),
        ("--task=stories --shard=", "--shard=:"),
        ("--task=stories --shard=a/b", "--shard=a/b"),
        ("--task=stories --threshold=2", "threshold=2.0"),
        ("--task=stories --output=dmax_jax", "--output=dmax_jax is a directory"),
    ],
)
def test_bad_flags_end_before_the_model_is_loaded(flags, culprit, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate.DECODING, "load", lambda: pytest.fail("loaded"))
    assert culprit in error_of(capsys, f"--output={tmp_path / 'a.jsonl'}", *flags.split())


def test_an_output_that_nobody_knows_is_not_overwritten(arguments, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("precious")
    assert "no a.jsonl.run.json that says what made them: choose another" in error_of(capsys, *arguments)
    assert (tmp_path / "a.jsonl").read_text() == "precious"
