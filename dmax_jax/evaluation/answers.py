"""What an answer says in the end, and whether that is right."""

import dataclasses
import re

# At most 30 digits: int() refuses thousands of them, and a model that loops can write as many.
FINAL = re.compile(r"####[ \t]*(-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,30}))\s*", re.ASCII)


def extract(text: str) -> int | None:
    """Returns the integer after the last `####`, thousands separators allowed; None if anything else stands there."""
    start = text.rfind("####")
    found = FINAL.fullmatch(text, start) if start >= 0 else None
    return None if found is None else int(found[1].replace(",", ""))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One problem and what the model made of it."""

    index: int  # of the problem in its set
    correct: bool
    extracted: int | None
    expected: int
    finished: bool  # an end token was generated
    generated_tokens: int  # before the first end token
    forwards: int  # over blocks; the prefill is not counted
    text: str
