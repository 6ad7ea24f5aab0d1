"""Where the models that come with the package lie."""

import pathlib

DEMO = pathlib.Path(__file__).parent / "stories"
DEMO_BASE = pathlib.Path(__file__).parent / "stories_base"
