import json
from collections import Counter

import numpy as np
import pytest

from dmax_jax.config import DataConfig
from dmax_jax.data.loader import make_loader
from dmax_jax.errors import InputError

STORIES = DataConfig(task="stories", samples=20, sequence_length=192)


@pytest.fixture
def make(tokenizer):
    """Makes loaders and ends their threads after the test."""
    loaders = []

    def make(data=STORIES, *, batch_size=8, accumulation=2, seed=0, alternating=False, **process):
        settings = {"batch_size": batch_size, "accumulation": accumulation, "seed": seed, "alternating": alternating}
        loaders.append(make_loader(data, tokenizer, **settings, **process))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def take(loader, steps):
    return [next(loader) for _ in range(steps)]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        for field, left, right in zip(x._fields, x, y, strict=True):
            np.testing.assert_array_equal(left, right, err_msg=field)
            assert left.dtype == right.dtype


def test_shapes_and_content(make, tokenizer):
    batch = next(make(accumulation=4))
    assert {field: (str(a.dtype), a.shape) for field, a in batch._asdict().items()} == {
        "tokens": ("int32", (4, 2, 192)),
        "prompt_length": ("int32", (4, 2)),
        "index": ("int32", (4, 2)),
        "epoch": ("int32", (4, 2)),
        "on_policy": ("bool", (4, 2)),
    }
    assert batch.on_policy.all()
    prompt = batch.tokens[3, 1, : batch.prompt_length[3, 1]].tolist()
    assert tokenizer.encode("<role>ASSISTANT</role>") == prompt[-3:]


@pytest.mark.parametrize("alternating", [False, True])
def test_every_epoch_has_every_sample_once_in_an_order_of_its_own(make, alternating):
    passes = 2 if alternating else 1
    batches = take(make(batch_size=4, alternating=alternating), 15 * passes)
    seen = Counter()
    orders = {}
    for batch in batches:
        for index, epoch, on_policy in zip(batch.index.flat, batch.epoch.flat, batch.on_policy.flat, strict=True):
            seen[int(index), int(epoch), bool(on_policy)] += 1
            orders.setdefault((int(epoch), bool(on_policy)), []).append(int(index))
    policies = (True, False)[:passes]
    assert seen == Counter((index, epoch, policy) for index in range(20) for epoch in range(3) for policy in policies)
    assert len({tuple(order) for order in orders.values()}) == 3 * passes


def test_going_on_after_a_restart_changes_nothing(make):
    straight = take(make(), 7)  # 20 samples, 8 to a step: crosses two epochs
    loader = make()
    assert_same(take(loader, 3), straight[:3])
    state = json.loads(json.dumps(loader.get_state()))
    assert_same(take(loader, 2), straight[3:5])
    loader.set_state(state)
    assert_same(take(loader, 4), straight[3:])
    other = make()
    other.set_state(state)
    assert_same(take(other, 4), straight[3:])


@pytest.mark.parametrize("alternating", [False, True])
def test_two_processes_share_the_batch_of_one(make, alternating):
    whole = take(make(alternating=alternating), 4)
    halves = [take(make(alternating=alternating, process_index=p, process_count=2), 4) for p in (0, 1)]
    assert halves[0][0].tokens.shape == (2, 2, 192)
    joined = [type(a)(*(np.concatenate(pair, axis=1) for pair in zip(a, b, strict=True))) for a, b in zip(*halves)]  # noqa: B905
    assert_same(joined, whole)


def test_worker_processes_change_nothing(make):
    data = DataConfig(task="stories", samples=20, sequence_length=192, workers=1)
    assert_same(take(make(data), 4), take(make(), 4))


def test_alternating_parts_are_of_one_kind(make):
    for batch in take(make(batch_size=16, accumulation=4, alternating=True), 3):
        np.testing.assert_array_equal(batch.on_policy.all(axis=1), [True, True, False, False])
        np.testing.assert_array_equal(batch.on_policy.any(axis=1), [True, True, False, False])


def test_the_seed_changes_stories_and_order(make):
    one, two = next(make()), next(make(seed=1))
    assert (one.index != two.index).any()
    assert (one.tokens != two.tokens).any()


def test_rows_of_a_file_that_do_not_fit_are_dropped_and_counted(make, tmp_path):
    rows = [{"question": f"{i}?", "answer": "yes " * (1 if i % 4 else 200)} for i in range(12)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    loader = make(DataConfig(path=str(file), sequence_length=32), batch_size=3, accumulation=1)
    assert (loader.samples, loader.dropped) == (9, 3)
    assert sorted(np.concatenate([batch.index.ravel() for batch in take(loader, 3)])) == list(range(9))
    with pytest.raises(InputError, match="sequence_length=16 is too short"):
        make(DataConfig(path=str(file), sequence_length=16))


def test_a_task_that_does_not_fit_says_what_it_needs(make):
    with pytest.raises(InputError, match=r"sequence_length=64 is too short for stories: a sample needs \d+ positions"):
        next(make(DataConfig(task="stories", samples=20, sequence_length=64)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 6, "accumulation": 4}, "batch_size=6 is no multiple of accumulation=4"),
        ({"batch_size": 8, "process_count": 3}, "process_count=3"),
        ({"batch_size": 3, "accumulation": 1, "alternating": True}, "must be even"),
    ],
)
def test_impossible_batches_are_refused(make, settings, message):
    with pytest.raises(InputError, match=message):
        make(**settings)


@pytest.mark.parametrize(("batch_size", "accumulation", "process_count"), [(1, 1, 1), (4, 4, 1), (8, 1, 8)])
def test_one_row_per_part(make, batch_size, accumulation, process_count):
    batch = next(make(batch_size=batch_size, accumulation=accumulation, process_count=process_count))
    assert batch.tokens.shape[:2] == (accumulation, 1)
