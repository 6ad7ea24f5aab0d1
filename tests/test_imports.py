"""Who may import whom, over every file of the package."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = "dmax_jax"

FOUNDATION = {"config", "errors", "determinism"}
MODEL = {"model", "sharding", "kernels"} | FOUNDATION
LIBRARIES = {"training", "decoding", "checkpoint", "data", "evaluation"} | MODEL
SHARED_BY_COMMANDS = {
    "command", "decoding_flags", "compilation_cache", "output_file", "assets", "trajectories", "answer_journal",
    "study", "measuring",
}  # fmt: skip
COMMANDS = {"train", "decode", "evaluate", "generate_trajectories", "train_tokenizer", "benchmark"}
# Every module or package of dmax_jax, and what else of dmax_jax it may import. Nothing may import a command.
ALLOWED = {
    "errors": set(),
    "determinism": set(),
    "config": {"errors"},
    "sharding": FOUNDATION,
    "kernels": FOUNDATION,
    "model": MODEL,
    "training": MODEL,
    "decoding": MODEL,
    "checkpoint": MODEL,
    "data": MODEL,
    "evaluation": MODEL | {"decoding", "data"},
    **dict.fromkeys(SHARED_BY_COMMANDS | COMMANDS, LIBRARIES | SHARED_BY_COMMANDS),
}
# The one file that ties siblings together.
EXCEPTIONS = {
    "training/loop.py": {"checkpoint", "data"},
    "training/run_record.py": {"checkpoint"},  # the part of the loop that describes the working directory
}
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
    assert ALLOWED.keys() == {owner(path) for path in FILES} - {"__init__"}


def test_no_file_needs_another_framework():
    files = [*FILES, ROOT / "convert_checkpoint.py", *(ROOT / "configs").glob("*.py")]
    needed = {str(path): {name.split(".")[0] for name in imported_names(path)} & FOREIGN for path in files}
    assert {path: names for path, names in needed.items() if names} == {}


def test_the_checks_see_what_they_should(tmp_path):
    file = tmp_path / "file.py"
    lines = ["import torch.nn as nn", "def f():", " from dmax_jax.training import loop", " import dmax_jax.data.bpe"]
    file.write_text("\n".join(lines))
    assert {"torch.nn", "dmax_jax.training", "dmax_jax.training.loop", "dmax_jax.data.bpe"} == imported_names(file)
