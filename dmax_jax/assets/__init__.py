"""Where the models that come with the package lie."""

import pathlib

DEMO = pathlib.Path(__file__).parent / "stories"
DEMO_BASE = pathlib.Path(__file__).parent / "stories_base"


def checkpoint_directory(name: str) -> pathlib.Path:
    """The directory of `demo` and `demo_base`; any other name is a path."""
    return {"demo": DEMO, "demo_base": DEMO_BASE}.get(name) or pathlib.Path(name)
