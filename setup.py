import pathlib
import re

from setuptools import find_packages, setup

here = pathlib.Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "dmax_jax" / "__init__.py").read_text()).group(1)

setup(
    name="dmax-jax",
    version=version,
    description="DMax diffusion language models in JAX: on-policy uniform training and soft parallel decoding",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dmax_jax", "dmax_jax.*"]),
    py_modules=["convert_checkpoint"],
    package_data={"dmax_jax": ["assets/*/*", "evaluation/player.html"]},
    install_requires=[
        "jax>=0.10.2,<0.12",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "grain>=0.2.18",
        "numpy>=2",
        "absl-py>=2.3",
        "ml_dtypes>=0.5",
        "safetensors>=0.6",
        "tokenizers>=0.21",
        "jinja2>=3.1",
        "tensorboardX>=2.6",
        "tqdm>=4.66",
    ],
    extras_require={
        "cuda13": ["jax[cuda13]>=0.10.2,<0.12"],
        "study": ["matplotlib>=3.9"],
        "test": ["matplotlib>=3.9", "pytest>=8", "pytest-xdist>=3.6", "ruff>=0.12"],
    },
)
