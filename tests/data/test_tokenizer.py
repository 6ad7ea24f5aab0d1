import json
import pickle
import shutil

import pytest

from dmax_jax.data.bpe import train_tokenizer
from dmax_jax.data.stories import story
from dmax_jax.data.tokenizer import load_tokenizer
from dmax_jax.errors import InputError


@pytest.fixture
def directory(demo_directory, tmp_path):
    return shutil.copytree(demo_directory, tmp_path / "tokenizer")


def edit(directory, **changes):
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("text", [story(9, 0, "test")["answer"], "  two  spaces\n\n\ttab", "Grüße, 東京 🙂", ""])
def test_decoding_undoes_encoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_stand_alone(tokenizer):
    assert tokenizer.encode("1207") == [tokenizer.encode(digit)[0] for digit in "1207"]
    assert tokenizer.encode("a 12")[-2:] == tokenizer.encode("12")


def test_special_tokens_have_the_last_ids_and_are_not_decoded(tokenizer):
    ids = tokenizer.encode("<role></role><|role_end|><|endoftext|><|mask|>")
    assert ids == list(range(tokenizer.vocab_size - 5, tokenizer.vocab_size))
    assert ids[-2:] == [tokenizer.eos_id, tokenizer.mask_id]
    assert tokenizer.decode([*tokenizer.encode("yes"), *ids]) == "yes"


def test_chat_template(tokenizer):
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "1 + 1?"}
    assistant = {"role": "assistant", "content": "2"}
    plain = "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role>1 + 1?<|role_end|>"
    assert tokenizer.render([user]) == plain + "<role>ASSISTANT</role>"
    assert tokenizer.render([user, assistant], False) == plain + "<role>ASSISTANT</role>2<|role_end|>"
    assert tokenizer.render([system, user]) == (
        "<role>SYSTEM</role>Be brief.\ndetailed thinking off<|role_end|>"
        "<role>HUMAN</role>1 + 1?<|role_end|><role>ASSISTANT</role>"
    )
    assert tokenizer.encode_prompt("1 + 1?") == tokenizer.encode_prompt([user])
    assert tokenizer.encode_prompt([user]) == tokenizer.encode(plain + "<role>ASSISTANT</role>")
    with pytest.raises(InputError, match="role tool is unknown"):
        tokenizer.render([user, {"role": "tool", "content": ""}])


def test_a_prompt_with_the_mask_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"must not contain <\|mask\|>"):
        tokenizer.encode_prompt("What is <|mask|>?")


def test_the_mask_must_be_the_models(directory, tokenizer):
    assert load_tokenizer(directory, tokenizer.mask_id).mask_id == tokenizer.mask_id
    role_end = tokenizer.encode("<|role_end|>")[0]
    with pytest.raises(InputError, match=f"is {tokenizer.mask_id} in the tokenizer, but mask_token_id is {role_end}"):
        load_tokenizer(directory, role_end)


def test_other_forms_of_the_config(directory, tokenizer):
    edit(directory, eos_token={"content": "<|endoftext|>", "special": True}, chat_template=None)
    loaded = load_tokenizer(directory)
    assert loaded.eos_id == tokenizer.eos_id
    with pytest.raises(InputError, match="no chat template"):
        loaded.encode_prompt("hello")
    (directory / "chat_template.jinja").write_text("{{ eos_token }}{{ messages[0].content }}")
    assert load_tokenizer(directory).render([{"role": "user", "content": "hello"}]) == "<|endoftext|>hello"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_files_are_named(directory, name):
    (directory / name).write_text("[1, 2")
    with pytest.raises(InputError, match=rf"{name}: corrupt .* again$"):
        load_tokenizer(directory)
    (directory / name).unlink()
    with pytest.raises(InputError, match=f"{name}: no such file"):
        load_tokenizer(directory)


def test_a_config_without_eos_is_refused(directory):
    edit(directory, eos_token=None)
    with pytest.raises(InputError, match="no eos_token"):
        load_tokenizer(directory)


def test_a_tokenizer_can_be_sent_to_another_process(tokenizer):
    tokenizer.encode_prompt("hello")
    assert pickle.loads(pickle.dumps(tokenizer)).encode_prompt("hello") == tokenizer.encode_prompt("hello")


def test_training_stops_at_the_wanted_size(tmp_path):
    train_tokenizer(["hello hello hello world <|mask|> mask"] * 3, 266, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 266
    assert len(tokenizer.encode("hello")) < 5
    assert tokenizer.mask_id == 265
