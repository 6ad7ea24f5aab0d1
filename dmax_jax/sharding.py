"""The device mesh, and which mesh axis each logical array axis lies on, per regime."""

import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dmax_jax.config import MeshConfig
from dmax_jax.errors import InputError

Rules = dict[str, str | tuple[str, ...] | None]

# Training splits the experts, 15.3 of the 16.3 billion parameters, and keeps everything else whole on each device.
TRAIN: Rules = {
    "batch": ("data", "expert"),
    "vocab": None,
    "embed": None,
    "heads": None,
    "ffn": None,
    "experts": "expert",
    "expert_ffn": None,
}
# Decoding splits every matrix that it reads whole, so that all devices read a part of each at once (model/shares.py).
DECODE: Rules = dict.fromkeys(TRAIN) | dict.fromkeys(("vocab", "heads", "ffn", "expert_ffn"), "tensor")


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Arranges the devices as [data, expert, tensor]; uses the first ones if the mesh needs fewer than there are."""
    devices = jax.devices() if devices is None else devices
    sizes = {"data": config.data, "expert": config.expert, "tensor": config.tensor}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    sizes = {name: len(devices) // fixed if size == -1 else size for name, size in sizes.items()}
    total = math.prod(sizes.values())
    if not 1 <= total <= len(devices):
        raise InputError(
            f"mesh data={config.data}, expert={config.expert}, tensor={config.tensor} needs "
            f"{max(total, fixed)} devices; there are {len(devices)}"
        )
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices[:total]
    )


def mesh_of(array: jax.Array) -> Mesh | None:
    """The mesh that an array lies on, None if that is a device without one."""
    sharding = getattr(array, "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def named_sharding(mesh: Mesh, rules: Rules, *axes: str | None) -> NamedSharding:
    """Sharding of an array whose dimensions have these logical names; None is a dimension that is never split."""
    unknown = [axis for axis in axes if axis is not None and axis not in rules]
    if unknown:
        raise KeyError(f"no sharding rule for logical axes {unknown}; known: {sorted(rules)}")
    return NamedSharding(mesh, PartitionSpec(*(None if axis is None else rules[axis] for axis in axes)))
