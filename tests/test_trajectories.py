import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dmax_jax import trajectories
from dmax_jax.data.examples import read_rows
from dmax_jax.data.shards import WHOLE, Shard
from dmax_jax.decoding.batch import DecodeSettings
from dmax_jax.decoding.policies import SpdPolicy, ThresholdPolicy
from dmax_jax.decoding_flags import LoadedModel
from dmax_jax.errors import InputError
from dmax_jax.trajectories import digest_weights, write_trajectories
from tests.models import SMALL, small_params

POLICY = ThresholdPolicy(threshold=0.3, temperature=1.0)  # each prompt has noise of its own
SETTINGS = DecodeSettings(gen_length=13, block_length=4, batch_size=2, seed=3)
ROWS = [{"question": f"{number} pens?", "answer": "many"} for number in range(10, 20)]
ROWS[4] = {"messages": [{"role": "user", "content": "14 pens?"}, {"role": "assistant", "content": "many"}]}


class LetterTokenizer:
    """A token per letter."""

    def encode_prompt(self, prompt):
        text = prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)
        return [ord(letter) % 40 for letter in text]

    def decode(self, ids):
        return "".join(chr(ord("A") + token) for token in ids)


@pytest.fixture(scope="module")
def model():
    return LoadedModel(SMALL, small_params(), LetterTokenizer(), None)


def write(model, output, *, rows=ROWS, policy=POLICY, settings=SETTINGS, shard=WHOLE):
    return write_trajectories(model, rows, policy, settings, output, shard=shard)


@pytest.fixture(scope="module")
def straight(model, tmp_path_factory):
    """The file of a run without interruption, and its figures."""
    path = tmp_path_factory.mktemp("straight") / "answers.jsonl"
    summary = write(model, path)
    return path.read_bytes(), summary


class Killed(BaseException):
    pass


@pytest.fixture
def kill_after(monkeypatch):
    """Lets decoding yield a number of answers and then fail, and counts what is decoded."""
    decode, decoded = trajectories.decode_prompts, []

    def install(number: float) -> list[int]:
        decoded.clear()

        def dying(*arguments, **keywords):
            for answer in decode(*arguments, **keywords):
                if len(decoded) == number:
                    raise Killed
                decoded.append(answer)
                yield answer

        monkeypatch.setattr(trajectories, "decode_prompts", dying)
        return decoded

    return install


def without_time(summary):
    return dataclasses.replace(summary, seconds=0.0)


def test_finished_answers_are_kept_in_order(straight, tmp_path):
    content, summary = straight
    (tmp_path / "answers.jsonl").write_bytes(content)
    rows = read_rows(tmp_path / "answers.jsonl")
    assert summary.questions == 10
    assert 0 < summary.kept == len(rows) < 10
    assert summary.unfinished == 10 - len(rows)
    assert summary.tps == summary.tokens / summary.seconds
    assert summary.tpf > 0
    texts = [row["question"] if "question" in row else row["messages"][0]["content"] for row in rows]
    assert texts == sorted(texts)
    assert len({json.dumps(row).split("?")[1] for row in rows}) == len(rows)  # answers of their own
    assert not any("many" in json.dumps(row) for row in rows)


def test_a_killed_run_goes_on_and_ends_with_the_same_file(model, straight, tmp_path, kill_after):
    path = tmp_path / "answers.jsonl"
    journal = tmp_path / "answers.jsonl.journal"
    kill_after(5)
    with pytest.raises(Killed):
        write(model, path)
    assert not path.exists()
    assert journal.read_bytes().count(b"\n") == 5
    decoded = kill_after(3)
    with pytest.raises(Killed):
        write(model, path)
    assert len(decoded) == 3
    assert journal.read_bytes().count(b"\n") == 7
    journal.write_bytes(journal.read_bytes()[:-20])  # in the middle of a line
    decoded = kill_after(float("inf"))
    summary = write(model, path)
    assert len(decoded) == 4
    assert path.read_bytes() == straight[0]
    assert without_time(summary) == without_time(straight[1])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["answers.jsonl", "answers.jsonl.run.json"]


def test_every_answer_is_on_disk_before_the_next(model, tmp_path, monkeypatch):
    decode, lines = trajectories.decode_prompts, []

    def watched(*arguments, **keywords):
        for answer in decode(*arguments, **keywords):
            lines.append((tmp_path / "answers.jsonl.journal").read_bytes().count(b"\n"))
            yield answer

    monkeypatch.setattr(trajectories, "decode_prompts", watched)
    write(model, tmp_path / "answers.jsonl")
    assert lines == list(range(10))


def test_killed_while_the_output_is_written(model, straight, tmp_path, kill_after, monkeypatch):
    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trajectories, "with_answer", killed)
        with pytest.raises(Killed):
            write(model, tmp_path / "answers.jsonl")
    decoded = kill_after(0)
    summary = write(model, tmp_path / "answers.jsonl")
    assert decoded == []
    assert (tmp_path / "answers.jsonl").read_bytes() == straight[0]
    assert without_time(summary) == without_time(straight[1])


def test_a_complete_file_is_left_alone(model, straight, tmp_path, kill_after):
    path = tmp_path / "answers.jsonl"
    first = write(model, path)
    (tmp_path / "answers.jsonl.journal").touch()  # killed just before it would have been removed
    before = path.stat()
    kill_after(0)
    assert write(model, path) == first
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert not (tmp_path / "answers.jsonl.journal").exists()


def with_other(model, what):
    """The arguments of a run that differs in one thing."""
    louder = jax.tree.map(lambda leaf: leaf * 1.01, model.params)
    return {
        "weights": {"model": dataclasses.replace(model, params=louder)},
        "model": {"model": dataclasses.replace(model, config=dataclasses.replace(SMALL, eos_token_id=44))},
        "questions": {"rows": [*ROWS[:-1], {"question": "99 pens?"}]},
        "fewer": {"rows": ROWS[:-1]},
        "method": {"policy": SpdPolicy(threshold=0.3, temperature=1.0)},
        "threshold": {"policy": dataclasses.replace(POLICY, threshold=0.4)},
        "seed": {"settings": dataclasses.replace(SETTINGS, seed=4)},
        "batch_size": {"settings": dataclasses.replace(SETTINGS, batch_size=3)},
    }[what]


@pytest.mark.parametrize(
    ("what", "named"),
    [("weights", "weights_digest"), ("model", r"model\.eos_token_id=45, this run has 44"), ("fewer", "questions=10"),
     ("questions", "questions_digest"), ("method", "method=ThresholdPolicy"), ("threshold", r"threshold=0\.3"),
     ("seed", "seed=3, this run has 4"), ("batch_size", "batch_size=2")],
)  # fmt: skip
def test_other_settings_are_refused(model, what, named, tmp_path, kill_after):
    path = tmp_path / "answers.jsonl"
    kill_after(2)
    with pytest.raises(Killed):
        write(model, path)
    journal = (tmp_path / "answers.jsonl.journal").read_bytes()
    other = {"model": model, "output": path} | with_other(model, what)
    with pytest.raises(InputError, match=f"{named}.*use the same settings"):
        write(**other)
    assert (tmp_path / "answers.jsonl.journal").read_bytes() == journal
    kill_after(float("inf"))
    write(model, path)
    with pytest.raises(InputError, match=named):
        write(**other)


@pytest.mark.parametrize("count", [2, 3, 7])  # 5 batches
def test_shards_one_after_another_are_the_file_of_a_single_run(model, straight, count, tmp_path):
    summaries = [write(model, tmp_path / "answers.jsonl", shard=Shard(index, count)) for index in range(count)]
    files = [tmp_path / f"answers-{index:05d}-of-{count:05d}.jsonl" for index in range(count)]
    assert b"".join(file.read_bytes() for file in files) == straight[0]
    records = [json.loads((tmp_path / f"{file.name}.run.json").read_text()) for file in files]
    assert all(record["settings"]["first_index"] % SETTINGS.batch_size == 0 for record in records)
    for figure in ("questions", "kept", "tokens"):
        assert sum(getattr(summary, figure) for summary in summaries) == getattr(straight[1], figure)
    (tmp_path / "whole.jsonl").write_bytes(straight[0])
    assert read_rows(tmp_path / "answers-*.jsonl") == read_rows(tmp_path / "whole.jsonl")


def test_a_killed_shard_goes_on(model, straight, tmp_path, kill_after):
    kill_after(2)
    with pytest.raises(Killed):
        write(model, tmp_path / "answers.jsonl", shard=Shard(1, 2))
    decoded = kill_after(float("inf"))
    for index in (0, 1):
        write(model, tmp_path / "answers.jsonl", shard=Shard(index, 2))
    assert len(decoded) == 8
    assert b"".join(file.read_bytes() for file in sorted(tmp_path.glob("*.jsonl"))) == straight[0]


def test_the_last_batch_of_a_shard_may_be_short(model, tmp_path):
    write(model, tmp_path / "whole.jsonl", rows=ROWS[:9])
    for index in (0, 1, 2, 3, 4):
        write(model, tmp_path / "answers.jsonl", rows=ROWS[:9], shard=Shard(index, 5))
    joined = b"".join(file.read_bytes() for file in sorted(tmp_path.glob("answers*.jsonl")))
    assert joined == (tmp_path / "whole.jsonl").read_bytes()


def test_without_a_tokenizer(model, tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.json is missing"):
        write(dataclasses.replace(model, tokenizer=None), tmp_path / "answers.jsonl")


def test_the_digest_knows_weights_and_not_where_they_lie():
    weights = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(weights, NamedSharding(mesh, PartitionSpec("x")))
    digest = digest_weights({"a": weights})
    assert digest == digest_weights({"a": spread})
    changed = weights.copy()
    changed[3, 2] = np.nextafter(changed[3, 2], 9)
    others = [-weights, changed, weights.astype(jax.numpy.bfloat16), np.zeros_like(weights)]
    assert len({digest, *(digest_weights({"a": other}) for other in others)}) == 5
