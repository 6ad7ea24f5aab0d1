"""Training of a small byte-level BPE tokenizer with LLaDA2's special tokens and chat template."""

import json
import pathlib
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dmax_jax.data.tokenizer import MASK, ROLE_END, compile_template

EOS = "<|endoftext|>"
SPECIAL_TOKENS = ("<role>", "</role>", ROLE_END, EOS, MASK)  # the last ids, in this order

# Words with the space before them, single digits, runs of other signs, line ends, remaining spaces.
WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = """\
{%- if messages[0].role == 'system' %}
{{- '<role>SYSTEM</role>' + messages[0].content + '\\ndetailed thinking off<|role_end|>' }}
{%- else %}
{{- '<role>SYSTEM</role>detailed thinking off<|role_end|>' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{{- '<role>HUMAN</role>' + message.content + '<|role_end|>' }}
{%- elif message.role == 'assistant' %}
{{- '<role>ASSISTANT</role>' + message.content + '<|role_end|>' }}
{%- elif message.role != 'system' or not loop.first %}
{{- raise_exception('role ' + message.role + ' is unknown or out of place') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<role>ASSISTANT</role>' }}
{%- endif %}
"""


def chat_text(row: dict[str, str]) -> str:
    """Returns a row's question and answer as a conversation under the chat template, to train the tokenizer on."""
    messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
    return compile_template(CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=False)


def train_tokenizer(texts: Iterable[str], vocab_size: int, directory: str | pathlib.Path) -> None:
    """Trains on texts and writes `tokenizer.json` and `tokenizer_config.json` into a directory.

    `vocab_size` counts the 256 bytes and the special tokens; the result is smaller when the texts have no more pairs
    to merge. Special tokens that are spelled out in the texts are not learned from.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_plain(text) for text in texts), trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))  # after the training, so that they get the last ids
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": EOS,
        "mask_token": MASK,
        "additional_special_tokens": list(SPECIAL_TOKENS[:3]),
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _plain(text: str) -> str:
    for token in SPECIAL_TOKENS:
        text = text.replace(token, "\n")
    return text
