import jax
import pytest

from dmax_jax.config import MeshConfig
from dmax_jax.errors import InputError
from dmax_jax.sharding import DECODE, TRAIN, make_mesh, named_sharding


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1)),
        ({"data": -1, "expert": 4}, (2, 4, 1)),
        ({"data": 2, "expert": 2, "tensor": -1}, (2, 2, 2)),
        ({"data": 1, "expert": 1, "tensor": 2}, (1, 1, 2)),  # fewer devices than there are
        ({"data": -1, "expert": 3}, (2, 3, 1)),
    ],
)
def test_mesh_sizes(sizes, shape):
    mesh = make_mesh(MeshConfig(**sizes))
    assert mesh.axis_names == ("data", "expert", "tensor")
    assert mesh.devices.shape == shape


@pytest.mark.parametrize("sizes", [{"data": 16}, {"data": 4, "tensor": 4}, {"data": -1, "expert": 9}])
def test_a_mesh_that_needs_more_devices_than_there_are_is_refused(sizes):
    needed = 9 if -1 in sizes.values() else 16
    with pytest.raises(InputError, match=rf"needs {needed} devices; there are 8"):
        make_mesh(MeshConfig(**sizes))


@pytest.mark.parametrize("sizes", [{"data": 0}, {"tensor": -2}, {"data": -1, "expert": -1}])
def test_senseless_sizes_are_refused(sizes):
    with pytest.raises(InputError, match="mesh: data="):
        MeshConfig(**sizes)


def test_rows_of_a_batch_lie_on_all_devices_of_the_data_and_expert_axes():
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    assert named_sharding(mesh, TRAIN, None, "batch").shard_shape((3, 8, 5)) == (3, 2, 5)


def test_an_unknown_axis_is_an_error():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(KeyError, match=r"batsh.*known.*batch"):
        named_sharding(mesh, TRAIN, "batsh", None)
    assert DECODE.keys() == TRAIN.keys()
