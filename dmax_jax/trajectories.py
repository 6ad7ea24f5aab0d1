"""A model's own answers to questions, as training data (paper, section 4.1), in runs that may be killed and go on.

Rounding may let an answer depend on what else is in its batch. So batches are cut the same way in every run: a killed
run goes on, and a shard begins, where a batch does.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from dmax_jax.answer_journal import Journal, Outcome, write_outcome
from dmax_jax.data.shards import WHOLE, Shard
from dmax_jax.data.tokenizer import Messages, Tokenizer
from dmax_jax.decoding.batch import Answer, DecodeSettings, decode_prompts, progress_by_batch
from dmax_jax.decoding.policies import Policy
from dmax_jax.decoding_flags import LoadedModel
from dmax_jax.errors import InputError
from dmax_jax.model.params import Params
from dmax_jax.output_file import whole_file


@dataclasses.dataclass(frozen=True)
class Summary:
    """The figures of all answers, those that did not end included."""

    questions: int
    kept: int
    tokens: int
    seconds: float  # of decoding
    tpf: float  # mean over answers, the prefill counted as one forward

    @property
    def unfinished(self) -> int:
        return self.questions - self.kept

    @property
    def tps(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def write_trajectories(
    model: LoadedModel,
    rows: Sequence[dict[str, Any]],
    policy: Policy,
    settings: DecodeSettings,
    output: pathlib.Path,
    *,
    shard: Shard = WHOLE,
    show_progress: bool = False,
) -> Summary:
    """Writes a shard's part of the rows with the model's answers, unfinished ones left out, to `shard.path(output)`.

    Goes on where an earlier run was ended, and does nothing if that one was complete. The shards' files one after
    another are the file of a single run. Raises InputError if other settings made what is there.
    """
    if model.tokenizer is None:
        raise InputError(f"{model.directory}: tokenizer.json is missing; questions are text")
    part, path = shard.part(len(rows), settings.batch_size), shard.path(output)
    rows = rows[part.start : part.stop]
    prompts = [model.tokenizer.encode_prompt(asked(row)) for row in rows]
    journal = Journal(path, describe(model, rows, prompts, part.start, policy, settings))
    if path.exists():
        return Summary(**journal.close())
    outcomes = journal.resume(len(rows), settings.batch_size)
    done = len(outcomes)
    answers = decode_prompts(
        model.params, model.config, prompts[done:], policy, settings, first_index=part.start + done
    )
    if show_progress:
        answers = with_progress_bar(answers, done, len(rows), settings.batch_size)
    with journal.file.open("a", encoding="utf-8") as file:
        for answer in answers:
            outcomes.append(to_outcome(answer, model.tokenizer))
            write_outcome(file, outcomes[-1])
            file.flush()  # to the operating system, which keeps it when the process is killed
    finish(journal, rows, outcomes, settings.batch_size)
    return Summary(**journal.close())


def asked(row: dict[str, Any]) -> str | Messages:
    """The row's question, or its conversation without the assistant's last turn."""
    return row["question"] if "question" in row else row["messages"][:-1]


def with_answer(row: dict[str, Any], text: str) -> dict[str, Any]:
    """The row with the model's answer in the place of its own."""
    if "question" in row:
        return {"question": row["question"], "answer": text}
    return {"messages": [*asked(row), {"role": "assistant", "content": text}]}


def to_outcome(answer: Answer, tokenizer: Tokenizer) -> Outcome:
    finished = answer.generated_tokens < len(answer.token_ids)  # else there is no EOS: the answer is cut off
    text = tokenizer.decode(answer.answer_ids) if finished else None
    return Outcome(text, answer.generated_tokens, answer.forwards, answer.seconds)


def with_progress_bar(answers: Iterable[Answer], done: int, total: int, batch_size: int) -> Iterator[Answer]:
    """Passes answers on and shows on stderr how many there are, and the tokens per second of decoding."""
    tokens, seconds = 0, 0.0
    with tqdm(total=total, initial=done, unit="answer", **progress_by_batch(batch_size)) as bar:
        for number, answer in enumerate(answers, start=1):
            tokens += answer.generated_tokens
            seconds += answer.seconds / batch_size
            yield answer
            bar.update()
            if number % batch_size == 0 or done + number == total:
                bar.set_postfix_str(f"{tokens / seconds:.0f} tokens/s")


def finish(journal: Journal, rows: Sequence[dict[str, Any]], outcomes: Sequence[Outcome], batch_size: int) -> None:
    """Writes figures and output; the output last, for it says that all is done."""
    journal.write_record(dataclasses.asdict(summarize(outcomes, batch_size)))
    with whole_file(journal.output) as file:
        for row, outcome in zip(rows, outcomes, strict=True):
            if outcome.answer is not None:
                file.write(json.dumps(with_answer(row, outcome.answer)) + "\n")


def summarize(outcomes: Sequence[Outcome], batch_size: int) -> Summary:
    return Summary(
        questions=len(outcomes),
        kept=sum(outcome.answer is not None for outcome in outcomes),
        tokens=sum(outcome.tokens for outcome in outcomes),
        seconds=sum(outcome.seconds for outcome in outcomes[::batch_size]),
        tpf=sum(outcome.tokens / (outcome.forwards + 1) for outcome in outcomes) / max(len(outcomes), 1),
    )


def describe(
    model: LoadedModel,
    rows: Sequence[dict[str, Any]],
    prompts: Sequence[Sequence[int]],
    first_index: int,
    policy: Policy,
    settings: DecodeSettings,
) -> dict[str, Any]:
    """Everything that the answers depend on, by name."""
    questions = json.dumps([[asked(row) for row in rows], prompts])
    return {
        "first_index": first_index,
        "questions": len(rows),
        "questions_digest": hashlib.sha256(questions.encode()).hexdigest()[:16],
        "weights_digest": digest_weights(model.params),
        "method": type(policy).__name__,
        **dataclasses.asdict(policy),
        **dataclasses.asdict(settings),
        **{f"model.{name}": value for name, value in dataclasses.asdict(model.config).items()},
    }


def digest_weights(params: Params) -> str:
    """A digest of all weights, the same on every device and mesh."""
    sums = [int(sum_bits(leaf)) for leaf in jax.tree.leaves(params)]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


@jax.jit
def sum_bits(array: jax.Array) -> jax.Array:
    """The sum of an array's scrambled bits: integers wrap instead of rounding, so that no order of adding matters."""
    bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}").astype(jnp.uint32)
    scrambled = bits * jnp.uint32(2654435761)  # odd: a bijection (Knuth's multiplicative hash)
    return jnp.sum(scrambled ^ (scrambled >> 15), dtype=jnp.uint32)
