"""Task `stories`: arithmetic word problems with worked answers, drawn without end from a seed.

The *core* of a story is its family and its numbers; names, things and phrasing are chosen afterwards. A hash of the
core decides whether it is a training or a test story, so a test problem never occurs in training in other words.
"""

import random
import zlib
from typing import NamedTuple

from dmax_jax.data.story_families import CONCLUSIONS, FACTOR, FAMILIES, OPENINGS, TRANSITIONS, Family, Step
from dmax_jax.errors import InputError

SPLITS = ("train", "test")
LARGEST = 99
NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lucy", "Max", "Emma", "Leo", "Nora", "Paul", "Kate")
NOUNS = (
    "pens",
    "apples",
    "books",
    "cards",
    "shells",
    "coins",
    "stamps",
    "marbles",
    "stickers",
    "beads",
    "nuts",
    "cups",
)
BAGS = (("bag", "bags"), ("box", "boxes"), ("pack", "packs"), ("basket", "baskets"))


class Core(NamedTuple):
    """What a story is about: its family and the value of every number in it, results included."""

    family: Family
    values: dict[str, int]


def story(seed: int, index: int, split: str) -> dict[str, str]:
    """Returns story `index` of a split as `question` and `answer`, whose last line is `#### N`.

    The same arguments give the same story. Raises InputError if `split` is neither train nor test.
    """
    if split not in SPLITS:
        raise InputError(f"stories: split {split!r} is none of {', '.join(SPLITS)}")
    # One integer with the three arguments side by side: Python mixes all of its bits into the generator's state.
    rng = random.Random((seed * len(SPLITS) + SPLITS.index(split)) << 64 | index)
    return tell(rng, draw_core(rng, split))


def draw_core(rng: random.Random, split: str) -> Core:
    """Draws numbers for a random family until they make a possible story of the wanted split."""
    family = rng.choice(FAMILIES)
    while True:
        # Several times as fast as randint, which would be half of the time that a story takes.
        numbers = {name: low + int(rng.random() * (high - low + 1)) for name, (low, high) in family.numbers.items()}
        if split_of(family, numbers) == split:
            values = solve(family, numbers)
            if values is not None:
                return Core(family, values)


def split_of(family: Family, numbers: dict[str, int]) -> str:
    """Says which split a core belongs to: one in ten is for testing.

    The numbers count in any order: 3 bags of 4 and 4 bags of 3, or two children who change places, stay together.
    """
    digest = zlib.crc32(f"{family.name} {sorted(numbers.values())}".encode())
    return "test" if digest % 10 == 0 else "train"


def solve(family: Family, numbers: dict[str, int]) -> dict[str, int] | None:
    """Returns the numbers together with all results; None if a result is not a whole number of a fitting size."""
    values = dict(numbers)
    for stage in family.stages:
        for step in stage:
            result = _calculate(values[step.left], step.op, values[step.right])
            if result is None:
                return None
            values[step.result] = result
    return values


def _calculate(x: int, op: str, y: int) -> int | None:
    """Returns `x op y` if a small calculation gives it exactly: sums within 2..99, tables of 2..9."""
    low, high = FACTOR
    if op == "*":
        return x * y if low <= x <= high and low <= y <= high else None
    if op == "/":
        return x // y if x % y == 0 and low <= x // y <= high else None
    result = x + y if op == "+" else x - y
    return result if 2 <= result <= LARGEST else None  # from 2: every noun is in the plural


def tell(rng: random.Random, core: Core) -> dict[str, str]:
    """Puts a core into words: names, things, phrasings and the order of independent steps are random."""
    name, friend = rng.sample(NAMES, 2)
    bag, bags = rng.choice(BAGS)
    words = {"name": name, "friend": friend, "noun": rng.choice(NOUNS), "bag": bag, "bags": bags}
    words |= {"child": "child", "plate": "plate"}
    question = " ".join(rng.choice(phrasings).format(**words, **core.values) for phrasings in core.family.question)
    steps = [step for stage in core.family.stages for step in rng.sample(stage, len(stage))]
    told = [_tell_step(rng, step, words, core.values) for step in steps]
    leads = [rng.choice(TRANSITIONS if number else OPENINGS) for number in range(len(steps))]
    result = core.values[steps[-1].result]
    conclusion = rng.choice(CONCLUSIONS).format(z=result)
    worked = " ".join(f"{lead} {step}" for lead, step in zip(leads, told, strict=True))
    return {"question": question, "answer": f"{worked} {conclusion}\n#### {result}"}


def _tell_step(rng: random.Random, step: Step, words: dict[str, str], values: dict[str, int]) -> str:
    x, y, z = values[step.left], values[step.right], values[step.result]
    swap = step.op in "+*" and rng.random() < 0.5
    equation = f"{y} {step.op} {x} = {z}" if swap else f"{x} {step.op} {y} = {z}"
    return rng.choice(step.phrasings).format(**words, x=x, y=y, z=z, eq=equation, who=words[step.who])
