import json

import pytest

from dmax_jax import command, evaluate
from dmax_jax.assets import DEMO
from dmax_jax.data.stories import story
from dmax_jax.data.tokenizer import load_tokenizer
from dmax_jax.decoding.batch import Answer
from dmax_jax.evaluation import run as evaluation_run
from dmax_jax.kernels.quantised_weight import KINDS
from dmax_jax.model.quantisation import weights_kind
from tests.conftest import GOLDEN
from tests.evaluation.random_model import write_random_model

SHORT = ("--task=stories", "--samples=3", "--batch_size=2", "--gen_length=16", "--block_length=16")


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch, tmp_path):
    """Keeps the command from writing into the user's cache; JAX itself has read the variable before."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return f"--checkpoint={write_random_model(tmp_path_factory.mktemp('random') / 'model')}"


def run(*arguments) -> None:
    command.run(evaluate.main, evaluate.FLAGS, evaluate.__doc__, ["evaluate", *map(str, arguments)])


def report(tmp_path, *arguments) -> dict:
    run(*arguments, f"--output={tmp_path / 'new' / 'out.json'}")
    return json.loads((tmp_path / "new" / "out.json").read_text())


def without_times(result: dict) -> dict:
    return {name: value for name, value in result.items() if name not in ("seconds", "tps")}


def test_a_sweep_is_the_same_as_single_runs(checkpoint, tmp_path, capsys, monkeypatch):
    loads, load = [], evaluate.DECODING.load
    monkeypatch.setattr(evaluate.DECODING, "load", lambda: loads.append(1) or load())
    sweep = report(tmp_path, checkpoint, *SHORT, "--method=threshold", "--thresholds=0.9,0")
    assert len(loads) == 1
    screen = capsys.readouterr()
    assert [line.split()[0] for line in screen.out.splitlines()] == ["threshold", "0.9", "0", "AUP"]
    assert screen.err.count("3/3") >= 2  # two progress bars
    careful, fast = sweep["results"]
    assert careful["forwards"] > fast["forwards"] == 2.0  # a prompt's tail may need a block of its own
    single = report(tmp_path, checkpoint, *SHORT, "--method=threshold", "--threshold=0")
    assert without_times(single["results"][0]) == without_times(fast)
    assert single["aup"] is None
    assert sweep["aup"] is not None


@pytest.mark.parametrize("kind", KINDS)
def test_8_bit_weights(kind, checkpoint, tmp_path, monkeypatch):
    loaded, load = [], evaluate.DECODING.load
    monkeypatch.setattr(evaluate.DECODING, "load", lambda: loaded.append(load()) or loaded[-1])
    out = report(tmp_path, checkpoint, *SHORT, "--threshold=0", f"--weights={kind}")
    assert weights_kind(loaded[0].params) == kind
    assert out["settings"]["weights"] == kind
    assert len(out["results"][0]["samples"]) == 3


def test_settings_and_samples(checkpoint, tmp_path):
    out = report(tmp_path, checkpoint, *SHORT, "--method=threshold", "--threshold=0", "--test_seed=1")
    settings = {"task": "stories", "test_seed": 1, "method": "threshold", "gen_length": 16, "batch_size": 2}
    assert settings.items() <= out["settings"].items()
    (result,) = out["results"]
    assert result["policy"]["threshold"] == 0.0
    for index, sample in enumerate(result["samples"]):
        assert sample["index"] == index
        assert sample["expected"] == int(story(1, index, "test")["answer"].split("####")[1])
        assert sample["extracted"] is None  # the model knows nothing
    tokens = sum(sample["generated_tokens"] for sample in result["samples"])
    assert tokens == result["tokens"] > 0
    assert result["tps"] == tokens / result["seconds"]


def test_right_answers_are_counted(checkpoint, tmp_path, monkeypatch):
    """A model that answers the first and the third story like its author, and the second without an end."""
    tokenizer = load_tokenizer(DEMO)

    def know(params, config, prompts, policy, settings):
        for index, prompt in enumerate(prompts):
            row = story(0, index, "test")
            assert prompt == tokenizer.encode_prompt(row["question"])
            ids = tokenizer.encode("I don't know" if index == 1 else row["answer"])
            end = [] if index == 1 else [tokenizer.eos_id]
            yield Answer(prompt, ids + end, generated_tokens=len(ids), forwards=9, seconds=[4, 4, 1][index], trace=None)

    monkeypatch.setattr(evaluation_run, "decode_prompts", know)
    (result,) = report(tmp_path, checkpoint, *SHORT)["results"]
    assert [sample["correct"] for sample in result["samples"]] == [True, False, True]
    assert [sample["finished"] for sample in result["samples"]] == [True, False, True]
    assert result["accuracy"] == 100 * 2 / 3
    assert result["seconds"] == 5
    assert result["samples"][0]["text"] == story(0, 0, "test")["answer"]


def test_defaults():
    seen = []
    argv = ["evaluate", "--task=stories"]
    command.run(lambda: seen.append(evaluate.DECODING.settings()), evaluate.FLAGS, evaluate.__doc__, argv)
    assert (seen[0].batch_size, seen[0].gen_length) == (64, 128)


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ("", "task"),
        ("--task=gsm8k", "'gsm8k'"),
        ("--task=absent.jsonl", "absent.jsonl"),
        ("--task=stories --samples=0", "samples=0"),
        ("--task=stories --test_seed=-1", "test_seed=-1"),
        ("--task=stories --thresholds=0.5,high", "--thresholds=0.5,high"),
        ("--task=stories --thresholds=", "--thresholds="),
        ("--task=stories --thresholds=0.5,2", "threshold=2.0"),
        ("--task=stories --thresholds=0.5 --threshold=0.5", "not both"),
        ("--task=stories --best_accuracy=101", "best_accuracy"),
        ("--task=stories --output=dmax_jax", "--output=dmax_jax"),
        ("--task=stories --checkpoint=absent", "absent: no such directory"),
        (f"--task=stories --checkpoint={GOLDEN / 'tiny' / 'checkpoint'}", "tokenizer.json is missing"),
    ],
)
def test_bad_input(arguments, culprit, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*arguments.split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert culprit in error
    assert error.count("\n") == 1
