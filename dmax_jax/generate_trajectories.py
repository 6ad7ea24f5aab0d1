"""Lets a base model answer prompts, and writes its answers as training data (paper, section 4.1).

One JSON row per finished answer: "question" (or "messages") and "answer". The defaults are the paper's: threshold
decoding at 0.95, temperature 0. Unfinished answers are dropped; right and wrong ones are kept.
  python -m dmax_jax.generate_trajectories --checkpoint=DIR --task=stories --samples=24000 --output=FILE.jsonl
"""

import json
import sys

from absl import flags
from tqdm import tqdm

from dmax_jax import command
from dmax_jax.compilation_cache import use_compilation_cache
from dmax_jax.data.examples import read_rows
from dmax_jax.data.tasks import get_task
from dmax_jax.data.tokenizer import Messages
from dmax_jax.decoding.batch import decode_prompts
from dmax_jax.decoding_flags import DecodingFlags
from dmax_jax.errors import InputError
from dmax_jax.output_file import prepare_output, whole_file

FLAGS = flags.FlagValues()
DECODING = DecodingFlags(FLAGS, checkpoint="demo_base", method="threshold", batch_size=64)
PROMPTS = flags.DEFINE_string(
    "prompts_file",
    None,
    "JSONL; each row has a question, or messages that end with an answer to replace.",
    flag_values=FLAGS,
)
TASK = flags.DEFINE_string("task", None, "Task whose training questions are asked instead.", flag_values=FLAGS)
SAMPLES = flags.DEFINE_integer("samples", 1000, "Questions of the task.", flag_values=FLAGS)
DATA_SEED = flags.DEFINE_integer("data_seed", 1, "Seed of the task's questions.", flag_values=FLAGS)
OUTPUT = flags.DEFINE_string("output", None, "JSONL file to write.", required=True, flag_values=FLAGS)


def main() -> None:
    rows = questions()
    policy, settings, output = DECODING.policy(), DECODING.settings(), prepare_output(OUTPUT.value)
    use_compilation_cache()
    model = DECODING.load()
    if model.tokenizer is None:
        raise InputError(f"{model.directory}: tokenizer.json is missing; questions are text")
    prompts = [model.tokenizer.encode_prompt(asked(row)) for row in rows]
    kept = 0
    with whole_file(output) as file:
        answers = decode_prompts(model.params, model.config, prompts, policy, settings)
        for row, answer in zip(rows, tqdm(answers, total=len(rows), unit="answer"), strict=True):
            if answer.generated_tokens == len(answer.token_ids):
                continue  # no EOS: the answer is cut off
            text = model.tokenizer.decode(answer.answer_ids)
            file.write(json.dumps(with_answer(row, text)) + "\n")
            kept += 1
    print(f"{kept} answers of {len(rows)} prompts ({len(rows) - kept} unfinished) in {output}", file=sys.stderr)


def questions() -> list[dict]:
    """The rows to answer, from the file or the task of the flags."""
    if bool(PROMPTS.value) == bool(TASK.value):
        raise InputError("give exactly one of --prompts_file and --task")
    if PROMPTS.value:
        return read_rows(PROMPTS.value, answered=False)
    if SAMPLES.value < 1 or DATA_SEED.value < 0:
        raise InputError(f"--samples={SAMPLES.value} must be at least 1 and --data_seed={DATA_SEED.value} not negative")
    row = get_task(TASK.value).row
    return [row(DATA_SEED.value, index, "train") for index in range(SAMPLES.value)]


def asked(row: dict) -> str | Messages:
    """The row's question, or its conversation without the assistant's last turn."""
    return row["question"] if "question" in row else row["messages"][:-1]


def with_answer(row: dict, text: str) -> dict:
    """The row with the model's answer in the place of its own."""
    if "question" in row:
        return {"question": row["question"], "answer": text}
    return {"messages": [*asked(row), {"role": "assistant", "content": text}]}


if __name__ == "__main__":
    command.run(main, FLAGS, __doc__)
