import json

import pytest

from dmax_jax.config import DataConfig
from dmax_jax.data.examples import read_rows
from dmax_jax.data.shards import WHOLE, Shard, matching_files
from dmax_jax.data.sources import open_source
from dmax_jax.errors import InputError


@pytest.mark.parametrize(("length", "batch_size", "count"), [(10, 4, 2), (99, 1, 7), (3, 8, 4), (64, 16, 4), (0, 4, 2)])
def test_parts_are_contiguous_and_begin_with_a_batch(length, batch_size, count):
    parts = [Shard(index, count).part(length, batch_size) for index in range(count)]
    assert [item for part in parts for item in part] == list(range(length))
    assert all(part.start % batch_size == 0 for part in parts)
    batches = [-(-len(part) // batch_size) for part in parts]
    assert max(batches) - min(batches) <= 1


def test_names(tmp_path):
    assert Shard(3, 12).path(tmp_path / "my.answers.jsonl") == tmp_path / "my.answers-00003-of-00012.jsonl"
    assert WHOLE.path(tmp_path / "answers.jsonl") == tmp_path / "answers.jsonl"


@pytest.mark.parametrize(("index", "count"), [(4, 4), (-1, 4), (0, 0)])
def test_a_shard_that_there_is_not(index, count):
    with pytest.raises(InputError, match=f"shard {index}/{count}"):
        Shard(index, count)


def write(path, *questions):
    path.write_text("".join(json.dumps({"question": question, "answer": "yes"}) + "\n" for question in questions))


def asked(pattern) -> str:
    return "".join(row["question"] for row in read_rows(pattern))


def test_all_files_of_a_pattern_are_read_in_order(tmp_path):
    for index in (2, 0, 3, 1):
        write(Shard(index, 4).path(tmp_path / "answers.jsonl"), *(f"{index}{letter}" for letter in "ab"))
    write(tmp_path / "more.jsonl", "m")
    (tmp_path / "answers-00001-of-00004.jsonl").write_text("")  # none of its answers was kept
    (tmp_path / "answers.jsonl").mkdir()
    assert asked(f"{tmp_path}/answers-*-of-00004.jsonl") == "0a0b2a2b3a3b"
    assert asked(f"{tmp_path}/*.jsonl") == "0a0b2a2b3a3bm"
    assert asked(f"{tmp_path}/more.jsonl") == "m"


def test_training_reads_all_shards(tokenizer, tmp_path):
    for index in (1, 0):
        write(Shard(index, 2).path(tmp_path / "answers.jsonl"), f"{index}?")
    whole = tmp_path / "whole.jsonl"
    write(whole, "0?", "1?")
    one, several = (
        open_source(DataConfig(path=str(path), sequence_length=32), tokenizer, seed=0)
        for path in (whole, tmp_path / "answers-*.jsonl")
    )
    assert several.tokens.tolist() == one.tokens.tolist()
    assert len(several.tokens) == 2


def test_a_name_that_only_looks_like_a_pattern(tmp_path):
    write(tmp_path / "a[1].jsonl", "bracket")
    write(tmp_path / "a1.jsonl", "other")
    assert asked(tmp_path / "a[1].jsonl") == "bracket"


def test_patterns_that_miss_something(tmp_path):
    pattern = f"{tmp_path}/answers-*.jsonl"
    with pytest.raises(InputError, match="no file matches"):
        matching_files(pattern)
    for index in (0, 1, 2):
        write(Shard(index, 4).path(tmp_path / "answers.jsonl"), "a")
    (tmp_path / "answers-00003-of-00004.jsonl.journal").touch()
    for incomplete in (pattern, f"{tmp_path}/answers*"):
        with pytest.raises(InputError, match=r"answers-00003-of-00004\.jsonl is missing"):
            matching_files(incomplete)
    write(Shard(3, 4).path(tmp_path / "answers.jsonl"), "a")
    assert len(matching_files(pattern)) == 4
    for index in (0, 1):
        write(Shard(index, 2).path(tmp_path / "answers.jsonl"), "a")
    with pytest.raises(InputError, match="in 2 shards and in 4"):
        matching_files(pattern)
    assert len(matching_files(f"{tmp_path}/answers-*-of-00002.jsonl")) == 2


def test_a_pattern_without_a_row(tmp_path):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(InputError, match=r"\*\.jsonl: .* empty"):
        read_rows(f"{tmp_path}/*.jsonl")
