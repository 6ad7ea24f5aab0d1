"""Text to token ids and back, with the chat template, from a checkpoint's Hugging Face files."""

import functools
import json
import pathlib
from typing import NoReturn

import jinja2.sandbox
import tokenizers

from dmax_jax.errors import InputError

MASK = "<|mask|>"
ROLE_END = "<|role_end|>"  # what the chat template puts after every turn
Messages = list[dict[str, str]]  # each with `role` (system, user or assistant) and `content`


class Tokenizer:
    """A Hugging Face tokenizer and its chat template.

    Attributes: `mask_id`, `eos_id`, and `vocab_size` with special tokens (a model's vocabulary may be padded beyond).
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict, chat_template: str | None, name: str):
        self._backend = backend
        self._chat_template = chat_template
        self._name = name
        # What a template may refer to: bos_token, eos_token and the like.
        self._special_tokens = {key: _content(value) for key, value in config.items() if key.endswith("_token")}
        self.mask_id = self._id_of(MASK)
        self.eos_id = self._id_of(self._special_tokens.get("eos_token"))
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)

    def _id_of(self, token: str | None) -> int:
        found = None if token is None else self._backend.token_to_id(token)
        if found is None:
            what = "no eos_token" if token is None else f"no token {token}"
            raise InputError(f"{self._name}: {what} in the tokenizer; take the files of a LLaDA2 checkpoint")
        return found

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text. Special tokens that are spelled out in it are recognised; none is added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids without special tokens."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def render(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """Returns a conversation as the model reads it; raises InputError if the chat template is missing or fails."""
        if self._chat_template is None:
            raise InputError(f"{self._name}: no chat template; add chat_template.jinja beside tokenizer.json")
        try:
            return compile_template(self._chat_template).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError) as error:  # TypeError: content that is no text
            raise InputError(f"{self._name}: the chat template refuses the conversation: {error}") from None

    def encode_prompt(self, prompt: str | Messages) -> list[int]:
        """Returns the ids of a question or conversation, up to where the assistant starts to speak.

        Raises InputError if a mask would be among them: the model would take it for a position to fill.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids = self.encode(self.render(messages))
        if self.mask_id in ids:
            raise InputError(f"a prompt must not contain {MASK}; remove it from: {_shorten(str(prompt))}")
        return ids


def load_tokenizer(directory: str | pathlib.Path, mask_token_id: int | None = None) -> Tokenizer:
    """Loads `tokenizer.json`, `tokenizer_config.json` and, if the latter has no template, `chat_template.jinja`.

    Raises InputError if a file is missing or corrupt, or if `<|mask|>` is not the model's `mask_token_id`.
    """
    directory = pathlib.Path(directory)
    text = _read(directory / "tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
        _corrupt(directory / "tokenizer.json", error)
    try:
        config = json.loads(_read(directory / "tokenizer_config.json"))
        template = config.get("chat_template")
    except (json.JSONDecodeError, AttributeError) as error:
        _corrupt(directory / "tokenizer_config.json", error)
    template_file = directory / "chat_template.jinja"
    if template is None and template_file.is_file():
        template = _read(template_file)
    tokenizer = Tokenizer(backend, config, template, str(directory))
    # In the autoregressive parent family the id of LLaDA2's mask is <|role_end|>, which stands in every prompt.
    if mask_token_id is not None and tokenizer.mask_id != mask_token_id:
        raise InputError(
            f"{directory}: {MASK} is {tokenizer.mask_id} in the tokenizer, but mask_token_id is {mask_token_id} "
            f"in the model's config; take both from one checkpoint"
        )
    return tokenizer


def _read(file: pathlib.Path) -> str:
    if not file.is_file():
        raise InputError(f"{file}: no such file; copy it from the checkpoint that the model comes from")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        _corrupt(file, error)


def _corrupt(file: pathlib.Path, error: Exception) -> NoReturn:
    raise InputError(f"{file}: corrupt ({_shorten(str(error))}); copy it from the checkpoint again") from None


def _content(token: str | dict | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}..."


# Outside the tokenizer, because a compiled template can't be sent to the processes that encode samples.
@functools.cache
def compile_template(template: str) -> jinja2.Template:
    """Compiles a chat template under the settings that such templates are written for."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
