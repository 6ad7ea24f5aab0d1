"""A picture of decoding: every answer as frames, one per forward, and a page of its own that plays them."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from dmax_jax.data.tokenizer import Tokenizer
from dmax_jax.decoding.batch import Answer, Step
from dmax_jax.decoding.policies import CreditPolicy, HierarchicalPolicy, Policy, SpdPolicy, ThresholdPolicy

MASKED, SOFT, FINAL = STATES = ("masked", "soft", "final")
UNCHANGED, PROMOTED, REVISED = CHANGES = ("", "promoted", "revised")

# Title and rule for a reader who has not heard of any of them.
METHODS = {
    SpdPolicy: (
        "Soft parallel decoding",
        "Tokens are written early and stay soft: each forward reads them as a mix of token and mask, and may revise "
        "them, until the block has settled.",
    ),
    ThresholdPolicy: (
        "Threshold decoding",
        "A token is written once the model is sure enough of it, and never changed again.",
    ),
    HierarchicalPolicy: (
        "Hierarchical decoding",
        "A token is written once the model is sure enough of it, or surer than of the rest of the gap, and never "
        "changed again.",
    ),
    CreditPolicy: (
        "Credit decoding",
        "A token is written once the model is sure enough of it, now and in the forwards before, and never changed "
        "again.",
    ),
}


class Cell(NamedTuple):
    """A position of the answer after a forward."""

    token_id: int
    state: str  # masked, soft (decoded, may still change) or final
    change: str  # by this forward: "", promoted (it was masked) or revised (it was decoded otherwise)
    confidence: float | None  # of the forward that the token is from; None where no forward wrote it


class Frame(NamedTuple):
    """The whole answer after so many forwards; the first frame, before any, is all masks."""

    forwards: int
    block: int  # of the answer, from 0; the first may begin with the prompt's tail
    step: int  # forwards so far in this block
    tokens: int  # decoded so far, before the first EOS
    cells: tuple[Cell, ...]


def frames(answer: Answer, policy: Policy, *, mask_id: int, eos_id: int) -> list[Frame]:
    """The frames of a traced answer: one before the first forward, then one after each.

    What soft parallel decoding has decoded is soft until its block ends; what the other methods decode is final. A mask
    that is left in a finished block counts as decoded, as it does in `Answer.generated_tokens`.
    """
    first, start = answer.trace[0].block, len(answer.prompt_ids)
    cells = [Cell(mask_id, MASKED, UNCHANGED, None)] * len(answer.token_ids)
    shown = [Frame(0, 0, 0, 0, tuple(cells))]
    for step, following in zip(answer.trace, [*answer.trace[1:], None], strict=True):
        ended = following is None or following.block != step.block
        state = SOFT if isinstance(policy, SpdPolicy) and not ended else FINAL
        cells = [cell._replace(change=UNCHANGED) if cell.change else cell for cell in cells]
        begin = step.block * len(step.token_ids) - start
        for offset in range(max(0, -begin), len(step.token_ids)):
            cells[begin + offset] = _refined(cells[begin + offset], step, offset, state, mask_id, policy)
        settled = begin + len(step.token_ids) if ended else max(0, begin)
        if following is None:  # an end token leaves the blocks after its own without a forward
            cells[settled:] = [Cell(token, FINAL, UNCHANGED, None) for token in answer.token_ids[settled:]]
        tokens = _count(cells, settled, eos_id)
        shown.append(Frame(len(shown), step.block - first, step.step + 1, tokens, tuple(cells)))
    return shown


def _refined(cell: Cell, step: Step, offset: int, state: str, mask_id: int, policy: Policy) -> Cell:
    """The position after a forward; for the other methods the confidence stays that of the forward that decoded it."""
    token, confidence = step.token_ids[offset], step.confidences[offset]
    if token == cell.token_id:
        kept = confidence if isinstance(policy, SpdPolicy) else cell.confidence
        return cell if cell.state == MASKED else Cell(token, state, UNCHANGED, kept)
    if token == mask_id:
        return Cell(token, MASKED, REVISED, None)
    return Cell(token, state, PROMOTED if cell.state == MASKED else REVISED, confidence)


def _count(cells: Sequence[Cell], settled: int, eos_id: int) -> int:
    """Decoded positions before the first EOS; all of the first `settled` are."""
    ids = [cell.token_id for cell in cells]
    end = ids.index(eos_id) if eos_id in ids else len(ids)
    return sum(at < settled or cell.state != MASKED for at, cell in enumerate(cells[:end]))


@dataclasses.dataclass(frozen=True)
class Run:
    """What one method and one checkpoint made of all prompts; without a tokenizer the page shows ids."""

    method: str
    checkpoint: str
    policy: Policy
    answers: Sequence[Answer]  # traced
    tokenizer: Tokenizer | None
    mask_id: int
    eos_id: int


def page(prompts: Sequence[str], runs: Sequence[Run]) -> str:
    """A self-contained HTML page that plays the answers of all runs to each prompt on one clock of forwards."""
    shown = [
        {"prompt": prompt, "runs": [_describe(run, run.answers[number]) for run in runs]}
        for number, prompt in enumerate(prompts)
    ]
    # Inside a script element a "<" could begin its end; in JSON it stands in strings alone.
    data = json.dumps(shown, separators=(",", ":")).replace("<", "\\u003c")
    template = pathlib.Path(__file__).with_name("player.html").read_text(encoding="utf-8")
    return template.replace("FRAMES_OF_ALL_PROMPTS", data, 1)


def _describe(run: Run, answer: Answer) -> dict[str, Any]:
    """A run's answer to one prompt as the page's script reads it: every frame has the cells that differ from before."""
    played = frames(answer, run.policy, mask_id=run.mask_id, eos_id=run.eos_id)
    title, rule = METHODS[type(run.policy)]
    ids = sorted({cell.token_id for frame in played for cell in frame.cells} - {run.mask_id})
    settings = {"method": run.method, "threshold": f"{run.policy.threshold:g}", "checkpoint": run.checkpoint}
    block_length = len(answer.trace[0].token_ids)
    return {
        "title": title,
        "rule": rule,
        "settings": [f"{name}={value}" for name, value in settings.items()],
        "texts": {token: _text(run.tokenizer, token) for token in ids},
        "mask": run.mask_id,
        "eos": run.eos_id,
        "block_length": block_length,
        "tail": len(answer.prompt_ids) % block_length,  # of the prompt, in the first block
        "length": len(answer.token_ids),
        "text": _text(run.tokenizer, *answer.answer_ids),
        "frames": [
            {"block": frame.block, "step": frame.step, "tokens": frame.tokens, "cells": _differing(before, frame)}
            for before, frame in zip([None, *played[:-1]], played, strict=True)
        ],
    }


def _text(tokenizer: Tokenizer | None, *ids: int) -> str:
    return "".join(f" {token}" for token in ids) if tokenizer is None else tokenizer.decode(list(ids))


def _differing(before: Frame | None, frame: Frame) -> list[list[int]]:
    """Position, token, state, change and percent of each cell that is not as before; before the first all are masks."""
    if before is None:
        return []
    return [
        [at, cell.token_id, STATES.index(cell.state), CHANGES.index(cell.change), _percent(cell.confidence)]
        for at, (old, cell) in enumerate(zip(before.cells, frame.cells, strict=True))
        if cell != old
    ]


def _percent(confidence: float | None) -> int:
    return -1 if confidence is None else round(100 * confidence)
