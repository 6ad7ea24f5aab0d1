"""Reading the safetensors files of a directory as one collection of tensors."""

import contextlib
import pathlib
from collections.abc import Iterator

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dmax_jax.checkpoint.hf_config import read_json
from dmax_jax.errors import InputError

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class TensorFiles(contextlib.ExitStack):
    """The memory-mapped tensors of a directory, by name; raises InputError for files that can't be read."""

    def __init__(self, directory: str | pathlib.Path):
        super().__init__()
        self.directory = pathlib.Path(directory)
        self._reader = {}  # name -> the open file that holds it
        with contextlib.ExitStack() as on_error:
            on_error.push(self)
            for file in _weight_files(self.directory):
                self._open(file)
            on_error.pop_all()

    def _open(self, file: pathlib.Path) -> None:
        try:
            reader = self.enter_context(safe_open(file, framework="np"))
        except FileNotFoundError:
            raise InputError(f"{file}: no such file, but {INDEX} names it") from None
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: not a complete safetensors file ({error}); copy it again") from None
        for name in reader.keys():  # noqa: SIM118, the reader is no mapping
            if name in self._reader:
                raise InputError(f"{file}: tensor {name} lies in another file as well")
            self._reader[name] = reader

    def __contains__(self, name: str) -> bool:
        return name in self._reader

    def __iter__(self) -> Iterator[str]:
        return iter(self._reader)

    def describe(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Returns a tensor's shape and dtype without reading it."""
        header = self._reader[name].get_slice(name)
        if header.get_dtype() not in DTYPES:
            raise InputError(f"{self.directory}: tensor {name} has dtype {header.get_dtype()}, not {', '.join(DTYPES)}")
        return tuple(header.get_shape()), DTYPES[header.get_dtype()]

    def read(self, name: str) -> np.ndarray:
        return self._reader[name].get_tensor(name)


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    if (directory / INDEX).exists():
        weight_map = read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise InputError(f"{directory / INDEX}: weight_map with a file for every tensor is missing")
        return [directory / file for file in sorted(set(weight_map.values()))]
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    raise InputError(f"{directory}: neither {SINGLE} nor {INDEX} is there")
