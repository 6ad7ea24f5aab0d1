"""Who may import whom, over every file of the package."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = "dmax_jax"

# What a command consists of; nothing below may import it.
COMMANDS = {
    "train",
    "decode",
    "evaluate",
    "generate_trajectories",
    "benchmark",
    "command",
    "decoding_flags",
    "compilation_cache",
    "assets",
}
FOUNDATION = {"config", "errors"}
MODEL = {"model", "sharding", "kernels"} | FOUNDATION
# Every module or package of dmax_jax, and what else of dmax_jax it may import.
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "sharding": FOUNDATION,
    "kernels": FOUNDATION,
    "model": MODEL,
    "training": MODEL,
    "decoding": MODEL,
    "checkpoint": MODEL,
    "data": MODEL,
    "evaluation": MODEL | {"decoding", "data"},
    **dict.fromkeys(COMMANDS, MODEL | COMMANDS | {"training", "decoding", "checkpoint", "data", "evaluation"}),
    "assets": set(),
}
# The one file that ties siblings together.
EXCEPTIONS = {"training/loop.py": {"checkpoint", "data"}}
# Only the model's layers and the kernels are for every accelerator; nothing here needs another framework.
FOREIGN = {"torch", "transformers", "tensorflow"}

FILES = sorted((ROOT / PACKAGE).rglob("*.py"))


def imported_names(path: pathlib.Path) -> set[str]:
    """Dotted names of everything that a file imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide who imports whom"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def owner(path: pathlib.Path) -> str:
    """The module or package of dmax_jax that a file belongs to."""
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


def parts_imported(path: pathlib.Path) -> set[str]:
    names = {name.split(".")[1] for name in imported_names(path) if name.startswith(f"{PACKAGE}.")}
    return names - {owner(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path):
    part = owner(path)
    if part == "__init__":
        assert not imported_names(path)
        return
    assert part in ALLOWED, f"say in this file what dmax_jax.{part} may import"
    allowed = ALLOWED[part] | EXCEPTIONS.get(str(path.relative_to(ROOT / PACKAGE)), set())
    assert parts_imported(path) <= allowed


def test_the_table_names_nothing_that_is_gone():
    parts = {owner(path) for path in FILES}
    assert ALLOWED.keys() - parts <= {"benchmark"}


@pytest.mark.parametrize("path", [*FILES, ROOT / "convert_checkpoint.py"], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_needs_another_framework(path):
    assert not {name.split(".")[0] for name in imported_names(path)} & FOREIGN


def test_the_checks_see_what_they_should(tmp_path):
    file = tmp_path / "file.py"
    file.write_text("import torch.nn as nn\ndef f():\n    from dmax_jax.training import loop\n    import dmax_jax.data.bpe\n")
    assert {"torch.nn", "dmax_jax.training", "dmax_jax.training.loop", "dmax_jax.data.bpe"} == imported_names(file)
