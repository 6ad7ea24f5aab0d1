"""Trains a byte-level BPE tokenizer with LLaDA2's special tokens and chat template on a task's training text.

The demo's own: python -m dmax_jax.train_tokenizer --task=stories --samples=20000 --vocab_size=768 --output=DIR
"""

import pathlib
import sys

from absl import flags

from dmax_jax import command
from dmax_jax.data.bpe import chat_text, train_tokenizer
from dmax_jax.data.tasks import get_task
from dmax_jax.data.tokenizer import load_tokenizer
from dmax_jax.errors import InputError

FLAGS = flags.FlagValues()
TASK = flags.DEFINE_string("task", None, "Task whose training samples are the text.", required=True, flag_values=FLAGS)
SAMPLES = flags.DEFINE_integer("samples", 20000, "How many.", lower_bound=1, flag_values=FLAGS)
DATA_SEED = flags.DEFINE_integer("data_seed", 0, "Seed of the samples.", lower_bound=0, flag_values=FLAGS)
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 768, "Tokens at most, special ones included.", flag_values=FLAGS)
OUTPUT = flags.DEFINE_string("output", None, "Directory of the two files.", required=True, flag_values=FLAGS)


def main() -> None:
    if VOCAB_SIZE.value < 261:
        raise InputError(f"--vocab_size={VOCAB_SIZE.value}: 256 bytes and 5 special tokens need 261")
    row = get_task(TASK.value).row
    directory = pathlib.Path(OUTPUT.value)
    directory.mkdir(parents=True, exist_ok=True)
    texts = (chat_text(row(DATA_SEED.value, index, "train")) for index in range(SAMPLES.value))
    train_tokenizer(texts, VOCAB_SIZE.value, directory)
    tokenizer = load_tokenizer(directory)
    print(
        f"{tokenizer.vocab_size} tokens, mask {tokenizer.mask_id}, end {tokenizer.eos_id}: {directory}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    command.run(main, FLAGS, __doc__)
