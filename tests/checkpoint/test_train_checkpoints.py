import errno
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dmax_jax.checkpoint.train_checkpoints import TrainCheckpoints
from dmax_jax.config import MeshConfig
from dmax_jax.errors import InputError
from dmax_jax.sharding import make_mesh


def toy_state(step: int) -> dict:
    mesh = make_mesh(MeshConfig(data=8))
    rows = jax.device_put(jnp.arange(64.0).reshape(16, 4) + step, NamedSharding(mesh, PartitionSpec("data")))
    return {"step": jnp.int32(step), "rows": rows, "pair": (jnp.full(3, step, jnp.bfloat16), jnp.arange(2))}


def abstract(state: dict, spec: PartitionSpec | None = None) -> dict:
    def describe(leaf):
        sharding = leaf.sharding
        if spec is not None and isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(describe, state)


def assert_identical(found, wanted) -> None:
    def same(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)

    jax.tree.map(same, found, wanted)


def steps_on_disk(directory: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def test_a_state_comes_back_with_its_shardings(tmp_path):
    data_state = {"epoch": 2, "next": [5, 7], "name": "grain"}
    with TrainCheckpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.save(3, toy_state(3), data_state)
    with TrainCheckpoints(tmp_path, keep=2) as checkpoints:
        state, data = checkpoints.restore(abstract(toy_state(0)))
        other, _ = checkpoints.restore(abstract(toy_state(0), PartitionSpec(None, None)))
    assert data == data_state
    assert_identical(state, toy_state(3))
    assert state["rows"].addressable_shards[0].data.shape == (2, 4)
    assert_identical(other, toy_state(3))
    assert other["rows"].sharding.spec == PartitionSpec(None, None)


def test_only_the_newest_are_kept(tmp_path):
    with TrainCheckpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, toy_state(step), {"step": step})
        checkpoints.wait()
        assert steps_on_disk(tmp_path) == [3, 4]
        assert checkpoints.latest_step() == 4
        state, data = checkpoints.restore(abstract(toy_state(0)), step=3)
        assert_identical(state, toy_state(3))
        assert data == {"step": 3}


def test_saves_follow_the_period_unless_forced(tmp_path):
    with TrainCheckpoints(tmp_path, keep=9, every_steps=4) as checkpoints:
        saved = [checkpoints.save(step, toy_state(step), {}) for step in range(1, 9)]
        assert saved == [False, False, False, True, False, False, False, True]
        assert checkpoints.save(9, toy_state(9), {}, force=True)
        assert not checkpoints.save(9, toy_state(0), {}, force=True)  # there already
        assert_identical(checkpoints.restore(abstract(toy_state(0)))[0], toy_state(9))
    assert steps_on_disk(tmp_path) == [4, 8, 9]


def test_a_state_may_be_donated_while_it_is_saved(tmp_path):
    advance = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 - 1, state), donate_argnums=0)
    state = {"rows": jnp.arange(2.0**20), "step": jnp.int32(7)}
    with TrainCheckpoints(tmp_path, keep=1) as checkpoints:
        described = abstract(state)
        checkpoints.save(7, state, {})
        for _ in range(3):
            state = advance(state)
        restored, _ = checkpoints.restore(described)
    np.testing.assert_array_equal(restored["rows"], np.arange(2.0**20))


def damage_arrays(step: pathlib.Path) -> None:
    for file in step.rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)


def damage_data_state(step: pathlib.Path) -> None:
    os.truncate(step / "data" / "metadata", 3)


@pytest.mark.parametrize("damage", [damage_arrays, damage_data_state])
def test_a_corrupt_checkpoint_is_named(tmp_path, damage):
    with TrainCheckpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, toy_state(1), {"epoch": 1})
        checkpoints.save(2, toy_state(2), {"epoch": 2})
    damage(tmp_path / "2")
    with TrainCheckpoints(tmp_path, keep=2) as checkpoints:
        with pytest.raises(InputError, match=r"/2: the checkpoint is corrupt"):
            checkpoints.restore(abstract(toy_state(0)))
        state, data = checkpoints.restore(abstract(toy_state(0)), step=1)
        assert_identical(state, toy_state(1))
        assert data == {"epoch": 1}


def test_a_state_of_another_shape_is_refused(tmp_path):
    with TrainCheckpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, toy_state(1), {})
        wider = abstract(toy_state(1)) | {"step": jax.ShapeDtypeStruct((2,), jnp.int32)}
        with pytest.raises(InputError, match="another configuration"):
            checkpoints.restore(wider)
        with pytest.raises(InputError, match="another configuration"):
            checkpoints.restore({"rows": abstract(toy_state(1))["rows"]})


def test_asking_for_what_is_not_there(tmp_path):
    with TrainCheckpoints(tmp_path, keep=1) as checkpoints:
        with pytest.raises(InputError, match="no checkpoint is there"):
            checkpoints.restore(abstract(toy_state(0)))
        checkpoints.save(1, toy_state(1), {})
        with pytest.raises(InputError, match="no checkpoint of step 5"):
            checkpoints.restore(abstract(toy_state(0)), step=5)


def test_remains_of_a_killed_save_are_ignored_and_removed(tmp_path):
    with TrainCheckpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, toy_state(1), {})
    (tmp_path / "2.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    with TrainCheckpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest_step() == 1
        checkpoints.save(3, toy_state(3), {})
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_a_full_disk_is_named_and_the_save_before_it_stays(tmp_path, monkeypatch):
    with TrainCheckpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, toy_state(1), {"epoch": 1})
    with monkeypatch.context() as patch, pytest.raises(InputError, match="the disk is full"):
        save_on_full_disk(tmp_path, patch)
    shutil.copytree(tmp_path / "1", tmp_path / "restarted" / "1")  # writers of the failed save may still be at work
    with TrainCheckpoints(tmp_path / "restarted", keep=1) as checkpoints:
        state, data = checkpoints.restore(abstract(toy_state(0)))
    assert_identical(state, toy_state(1))
    assert data == {"epoch": 1}


def save_on_full_disk(directory: pathlib.Path, patch: pytest.MonkeyPatch) -> None:
    with TrainCheckpoints(directory, keep=1) as checkpoints:
        patch.setattr("builtins.open", full_disk)
        patch.setattr(os, "open", full_disk)
        checkpoints.save(2, toy_state(2), {"epoch": 2})
        checkpoints.wait()


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
