import json

import pytest

from dmax_jax.data.examples import encode_example, read_rows
from dmax_jax.errors import InputError

ROW = {"question": "1 + 1?", "answer": "It is 2.\n#### 2"}
MESSAGES = {"messages": [{"role": "user", "content": ROW["question"]}, {"role": "assistant", "content": ROW["answer"]}]}


def test_layout(tokenizer):
    prompt = tokenizer.encode_prompt(ROW["question"])
    target = tokenizer.encode("It is 2.\n#### 2<|role_end|>")
    needed = len(prompt) + len(target) + 1
    example = encode_example(tokenizer, ROW, needed + 3)
    assert example.tokens.dtype == "int32"
    assert example.tokens.tolist() == prompt + target + [tokenizer.eos_id] * 4
    assert example.prompt_length == len(prompt)
    assert encode_example(tokenizer, ROW, needed).tokens[-2:].tolist() == [target[-1], tokenizer.eos_id]
    assert encode_example(tokenizer, ROW, needed - 1) is None


def test_messages_say_the_same_as_question_and_answer(tokenizer):
    a, b = encode_example(tokenizer, ROW, 128), encode_example(tokenizer, MESSAGES, 128)
    assert (a.tokens == b.tokens).all()
    assert a.prompt_length == b.prompt_length


@pytest.mark.parametrize("row", [{"question": "1?"}, {"prompt": "1?"}, {"messages": MESSAGES["messages"][:1]}, ["1?"]])
def test_other_rows_are_refused(tokenizer, row):
    with pytest.raises(InputError, match=r"needs question and answer.*1"):
        encode_example(tokenizer, row, 128)


def test_an_answer_with_the_mask_is_refused(tokenizer):
    with pytest.raises(InputError, match="an answer must not contain"):
        encode_example(tokenizer, {"question": "1?", "answer": "<|mask|>"}, 128)


def test_rows_of_a_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(ROW)}\n\n{json.dumps(MESSAGES)}\n")
    assert read_rows(file) == [ROW, MESSAGES]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ('{"question": "a", "answer": "b"}\n{"question"', "line 2: no valid JSON"),
        ('{"question": "a", "answer": "b"}\n{"question": "a"}', "line 2: a sample needs question and answer"),
    ],
)
def test_broken_files_are_named(tmp_path, text, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(InputError, match=rf"rows\.jsonl.*{message}"):
        read_rows(file)
    with pytest.raises(InputError, match="no such file"):
        read_rows(tmp_path / "other.jsonl")


def test_questions_without_answers_are_read_when_asked_for(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "1 + 1?"}\n')
    assert read_rows(file, answered=False) == [{"question": "1 + 1?"}]
    with pytest.raises(InputError, match="line 1"):
        read_rows(file)
