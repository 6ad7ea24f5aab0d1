import pathlib

import pytest

import dmax_jax
from dmax_jax.data.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def demo_directory() -> pathlib.Path:
    return pathlib.Path(dmax_jax.__file__).parent / "assets" / "stories"


@pytest.fixture(scope="session")
def tokenizer(demo_directory) -> Tokenizer:
    return load_tokenizer(demo_directory)
