"""Lets a base model answer questions, and writes its answers as training data (paper, section 4.1).

One JSON row per finished answer: "question" (or "messages") and "answer". The defaults are the paper's: threshold
decoding at 0.95, temperature 0. Unfinished answers are dropped; right and wrong ones are kept.
  python -m dmax_jax.generate_trajectories --checkpoint=DIR --task=stories --samples=24000 --output=answers.jsonl

A run that was interrupted or killed goes on when it is started again with the same flags, and writes what it would have
written without; with other flags it is refused. Until the end its answers are in answers.jsonl.journal;
answers.jsonl.run.json has its settings and figures.

On several machines or GPUs, start it once on each with --shard=0/4, --shard=1/4 and so on, other flags the same. They
write answers-00000-of-00004.jsonl and so on, which one after another are the file of a single run; training reads them
with --config.data.path='answers-*-of-00004.jsonl'.
"""

from absl import flags

from dmax_jax import command
from dmax_jax.compilation_cache import use_compilation_cache
from dmax_jax.data.examples import read_rows
from dmax_jax.data.shards import WHOLE, Shard
from dmax_jax.data.tasks import get_task
from dmax_jax.decoding_flags import DecodingFlags
from dmax_jax.errors import InputError
from dmax_jax.output_file import prepare_output
from dmax_jax.trajectories import write_trajectories

FLAGS = flags.FlagValues()
DECODING = DecodingFlags(FLAGS, checkpoint="demo_base", method="threshold", batch_size=64)
PROMPTS = flags.DEFINE_string(
    "prompts_file",
    None,
    "JSONL, or a glob pattern; each row has a question, or messages that end with an answer to replace.",
    flag_values=FLAGS,
)
TASK = flags.DEFINE_string("task", None, "Task whose training questions are asked instead.", flag_values=FLAGS)
SAMPLES = flags.DEFINE_integer("samples", 1000, "Questions of the task.", flag_values=FLAGS)
DATA_SEED = flags.DEFINE_integer("data_seed", 1, "Seed of the task's questions.", flag_values=FLAGS)
SHARD = flags.DEFINE_string(
    "shard", None, "INDEX/COUNT: answer only this part of the questions, such as 0/4, the first quarter, into a file "
    "of its own; 0/1 is all.", flag_values=FLAGS,
)  # fmt: skip
OUTPUT = flags.DEFINE_string("output", None, "JSONL file to write.", required=True, flag_values=FLAGS)


def main() -> None:
    shard, rows = requested_shard(), questions()
    policy, settings, output = DECODING.policy(), DECODING.settings(), prepare_output(OUTPUT.value)
    path = shard.path(output)
    complete = path.exists()
    use_compilation_cache()
    summary = write_trajectories(DECODING.load(), rows, policy, settings, output, shard=shard, show_progress=True)
    print(
        f"{path}{' was complete already' if complete else ''}: {summary.kept} answers of {summary.questions} questions "
        f"({summary.unfinished} unfinished), {summary.tokens} tokens, {summary.tps:.1f} tokens/s (TPS), "
        f"{summary.tpf:.2f} tokens per forward (TPF)"
    )


def requested_shard() -> Shard:
    """The shard of the flag; raises InputError if it is none."""
    if SHARD.value is None:
        return WHOLE
    index, _, count = SHARD.value.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"--shard={SHARD.value}: write INDEX/COUNT, with INDEX from 0 to COUNT - 1, such as 0/4")
    return Shard(int(index), int(count))


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


if __name__ == "__main__":
    command.run(main, FLAGS, __doc__)
