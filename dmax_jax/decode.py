"""Answers prompts with a checkpoint, and says how many tokens each forward of the model gave.

  python -m dmax_jax.decode --prompt="Tom works 6 hours at 7 dollars each. Then Tom pays 5 dollars each for 6 cards. How
    many dollars are left?"
  python -m dmax_jax.decode --checkpoint=DIR --prompts_file=FILE.jsonl --batch_size=16 --output=FILE.json

Every answer goes to stdout (as token ids where the checkpoint brings no tokenizer), then a line of figures: tokens
before the end token, forwards over blocks, tokens per forward (TPF; the prefill counts as one forward more) and tokens
per second (TPS; the prefill counts, compilation doesn't). --output writes one JSON object, or with --prompts_file a
list with an object per row: prompt_ids, token_ids, text, forwards, generated_tokens, tpf, tps, seconds (of its whole
batch), method and all settings; with --trace also "trace", the block after each forward.

--stream prints the answer to a single prompt block by block, as each is settled.

--method, --checkpoint and --threshold may be repeated, to compare: the prompts are answered once per value, and the
JSON is a list with an object per answer. Values are paired in order; a flag given once serves all.

--html writes a page that plays how each answer came about, forward by forward, and needs nothing but a browser; what is
compared plays side by side on one clock of forwards:

  python -m dmax_jax.decode --checkpoint=demo_base --method=threshold --checkpoint=demo --method=spd --gen_length=128
    --html=decoding.html --prompt="Tom works 6 hours at 7 dollars each. Then Tom pays 5 dollars each for 6 cards. How
    many dollars are left?"
"""

import dataclasses
import json
import pathlib
from typing import Any

from absl import flags
from tqdm import tqdm

from dmax_jax import command
from dmax_jax.assets import checkpoint_directory
from dmax_jax.checkpoint.layout import detect_layout
from dmax_jax.compilation_cache import use_compilation_cache
from dmax_jax.data.tokenizer import Messages, Tokenizer
from dmax_jax.decoding.batch import Answer, DecodeSettings, decode_prompts, progress_by_batch
from dmax_jax.decoding.policies import Policy
from dmax_jax.decoding_flags import DecodingFlags, LoadedModel
from dmax_jax.errors import InputError
from dmax_jax.evaluation.metrics import total_seconds
from dmax_jax.evaluation.player import Run, page
from dmax_jax.output_file import prepare_output, whole_file, write_json

FLAGS = flags.FlagValues()
DECODING = DecodingFlags(FLAGS, repeatable=True)
PROMPT = flags.DEFINE_string("prompt", None, "A question; it goes through the chat template.", flag_values=FLAGS)
INPUT_IDS = flags.DEFINE_string("input_ids", None, "The prompt's token ids as they are: 5,7,9.", flag_values=FLAGS)
PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file", None, "JSONL; each row has one of: prompt (a question), messages (a conversation that ends with "
    "the user's), input_ids.", flag_values=FLAGS,
)  # fmt: skip
OUTPUT = flags.DEFINE_string(
    "output", None, "JSON file to write: an object; a list of them with --prompts_file or a repeated --method.",
    flag_values=FLAGS,
)  # fmt: skip
HTML = flags.DEFINE_string(
    "html", None, "HTML file to write: a page that plays every answer forward by forward.", flag_values=FLAGS
)
TRACE = flags.DEFINE_bool(
    "trace",
    False,
    "Add to the JSON the block after every forward: block, step, token_ids, stop, confidences.",
    flag_values=FLAGS,
)
STREAM = flags.DEFINE_bool(
    "stream",
    False,
    "Print the answer block by block as each is settled; one prompt, one method.",
    flag_values=FLAGS,
)

Prompt = str | Messages | list[int]


def main() -> None:
    prompts = requested_prompts()
    if TRACE.value and not OUTPUT.value:
        raise InputError("--trace needs --output: the trace is part of the JSON")
    runs = DECODING.runs()
    if STREAM.value and (PROMPTS_FILE.value is not None or len(runs) > 1):
        raise InputError("--stream is for one prompt and one method, checkpoint and threshold")
    policies = [run.policy() for run in runs]
    settings = DECODING.settings(trace=TRACE.value or HTML.value is not None)
    output = prepare_output(OUTPUT.value) if OUTPUT.value else None
    html = None if HTML.value is None else prepare_html(HTML.value)
    directories = [checkpoint_directory(run.checkpoint) for run in runs]
    for directory in directories:
        detect_layout(directory)  # a checkpoint that isn't there is refused before any is used
    use_compilation_cache()
    records, played, model = [], [], None
    for run, policy, directory in zip(runs, policies, directories, strict=True):
        if model is None or model.directory != directory:
            model = None  # makes room for the next
            model = run.load()
        name = f"{run.method} {policy.threshold:g} ({run.checkpoint}): " if len(runs) > 1 else ""
        answers = answer_prompts(prompts, model, policy, settings, name)
        records += [to_record(answer, run, model.tokenizer) for answer in answers]
        mask_id, eos_id = model.config.mask_token_id, model.config.eos_token_id
        played.append(Run(run.method, run.checkpoint, policy, answers, model.tokenizer, mask_id, eos_id))
    if output:
        write_json(output, records if PROMPTS_FILE.value is not None or len(runs) > 1 else records[0])
    if html:
        with whole_file(html) as file:
            file.write(page([prompt_text(prompt, played[0].tokenizer) for prompt in prompts], played))


def answer_prompts(
    prompts: list[Prompt], model: LoadedModel, policy: Policy, settings: DecodeSettings, name: str
) -> list[Answer]:
    """Answers the prompts and prints each answer; the run's name, if any, stands before its figures."""
    ids = [encode(prompt, model) for prompt in prompts]
    stream = Stream(len(ids[0]), model, settings) if STREAM.value else None
    decoded = decode_prompts(model.params, model.config, ids, policy, settings, on_block=stream)
    answers = []
    batches = progress_by_batch(settings.batch_size)
    for answer in tqdm(decoded, total=len(ids), unit="answer", disable=len(ids) <= settings.batch_size, **batches):
        text = shown(answer, model.tokenizer, name)
        # tqdm's does not tear the progress bar as print does.
        tqdm.write(text if stream is None else stream.rest_of(text))
        answers.append(answer)
    if len(answers) > 1:
        tokens, forwards = (sum(getattr(a, field) for a in answers) for field in ("generated_tokens", "forwards"))
        tpf, tps = tokens / (forwards + len(answers)), tokens / total_seconds(answers, settings.batch_size)
        print(f"{name}together: {figures(tokens, forwards, tpf, tps)}")
    return answers


class Stream:
    """Prints an answer as far as its blocks are settled; `printed` is what stands there."""

    def __init__(self, prompt_length: int, model: LoadedModel, settings: DecodeSettings):
        self.printed = ""
        self._model, self._settings = model, settings
        self._first = prompt_length // settings.block_length * settings.block_length
        self._prompt_part = prompt_length - self._first
        self._blocks: dict[int, list[int]] = {}

    def __call__(self, index: int, start: int, tokens: list[int]) -> None:
        self._blocks[start] = tokens
        ids, position = [], self._first
        while position in self._blocks:  # they may come in another order
            ids += self._blocks[position]
            position += self._settings.block_length
        text = answer_text(self._before_end(ids[self._prompt_part :]), self._model.tokenizer).rstrip("\ufffd")
        if text.startswith(self.printed):  # not if a character is still in pieces
            print(text[len(self.printed) :], end="", flush=True)
            self.printed = text

    def rest_of(self, text: str) -> str:
        """What is left to print; all of it, on a line of its own, if it doesn't begin as what stands there."""
        return text[len(self.printed) :] if text.startswith(self.printed) else f"\n{text}"

    def _before_end(self, ids: list[int]) -> list[int]:
        given = self._settings.eos_id
        eos_id = self._model.config.eos_token_id if given is None else given
        return ids[: ids.index(eos_id)] if eos_id in ids else ids


def prepare_html(name: str) -> pathlib.Path:
    """As prepare_output; raises InputError if it is the file of --output, too."""
    path = prepare_output(name, "--html")
    if OUTPUT.value and path.absolute() == pathlib.Path(OUTPUT.value).absolute():
        raise InputError(f"--html={name} is the file of --output; name another")
    return path


def requested_prompts() -> list[Prompt]:
    """The prompts of whichever flag is given; raises InputError unless it is exactly one, with something in it."""
    if sum(flag.value is not None for flag in (PROMPT, INPUT_IDS, PROMPTS_FILE)) != 1:
        raise InputError("give exactly one of --prompt, --input_ids and --prompts_file")
    if PROMPTS_FILE.value is not None:
        return read_prompts(pathlib.Path(PROMPTS_FILE.value))
    if INPUT_IDS.value is not None:
        return [parse_ids(INPUT_IDS.value)]
    if not PROMPT.value.strip():
        raise InputError("--prompt is empty; write a question")
    return [PROMPT.value]


def parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--input_ids={text}: write token ids with commas between them, such as 5,7,9") from None


def read_prompts(path: pathlib.Path) -> list[Prompt]:
    """Reads the prompts of a JSONL file; empty lines are skipped. Raises InputError naming file and line."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a JSONL file with prompt, messages or input_ids in each line")
    prompts = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            try:
                prompts.append(row_prompt(json.loads(line)))
            except ValueError as error:  # InputError, bad JSON or bad UTF-8
                reason = error if isinstance(error, InputError) else f"not JSON ({error})"
                raise InputError(f"{path}, line {number}: {reason}") from None
    if not prompts:
        raise InputError(f"{path}: the file has no prompt")
    return prompts


def row_prompt(row: Any) -> Prompt:
    given = [row[name] for name in ("prompt", "messages", "input_ids") if name in row] if isinstance(row, dict) else []
    if len(given) == 1 and (is_text(given[0]) or is_conversation(given[0]) or is_ids(given[0])):
        return given[0]
    raise InputError(
        "a row needs one of: prompt (text), messages (role and content each, the last not the assistant's), "
        "input_ids (whole numbers)"
    )


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in value)
        and value[-1]["role"] != "assistant"
    )


def encode(prompt: Prompt, model: LoadedModel) -> list[int]:
    if is_ids(prompt):
        return prompt
    if model.tokenizer is None:
        raise InputError(f"{model.directory}: tokenizer.json is missing, which text needs; add it or use --input_ids")
    return model.tokenizer.encode_prompt(prompt)


def prompt_text(prompt: Prompt, tokenizer: Tokenizer | None) -> str:
    """A prompt as a reader wants to see it: without the chat template."""
    if isinstance(prompt, str):
        return prompt
    if is_ids(prompt):
        return ",".join(map(str, prompt)) if tokenizer is None else tokenizer.decode(prompt)
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def shown(answer: Answer, tokenizer: Tokenizer | None, name: str) -> str:
    """The text (or the ids) before the end token, and the line of figures."""
    text = answer_text(answer.answer_ids, tokenizer)
    return f"{text}\n{name}{figures(answer.generated_tokens, answer.forwards, answer.tpf, answer.tps)}"


def answer_text(ids: list[int], tokenizer: Tokenizer | None) -> str:
    return ",".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)


def figures(tokens: int, forwards: int, tpf: float, tps: float) -> str:
    return f"{tokens} tokens, {forwards} forwards + prefill, {tpf:.2f} tokens/forward (TPF), {tps:.1f} tokens/s (TPS)"


def to_record(answer: Answer, run: DecodingFlags, tokenizer: Tokenizer | None) -> dict:
    """The JSON object of an answer; the policy's settings stand beside the others."""
    fields, settings = dataclasses.asdict(answer), run.describe()
    trace, policy = fields.pop("trace"), settings.pop("policy")
    text = None if tokenizer is None else tokenizer.decode(answer.answer_ids)
    record = fields | {"text": text, "tpf": answer.tpf, "tps": answer.tps} | settings | policy
    return record | {"trace": trace} if TRACE.value else record


if __name__ == "__main__":
    command.run(main, FLAGS, __doc__)
