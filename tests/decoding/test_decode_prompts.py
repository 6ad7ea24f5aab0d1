import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax._src import compiler

from dmax_jax.decoding.batch import Answer, DecodeSettings, check_prompt, decode_prompts, prefill_bucket
from dmax_jax.decoding.generate import Geometry, generate
from dmax_jax.decoding.policies import SpdPolicy
from dmax_jax.errors import InputError
from tests.models import SMALL, small_params

SETTINGS = DecodeSettings(gen_length=13, block_length=4, batch_size=2)
POLICY = SpdPolicy(threshold=0.3, accept_threshold=0.6)


@pytest.fixture(scope="module")
def params():
    return small_params()


def decode(params, prompts, policy=POLICY, **changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    return list(decode_prompts(params, SMALL, prompts, policy, settings))


@pytest.fixture
def compilations():
    """The names of what is compiled during the test."""
    names = []

    def note(event: str, seconds: float, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(details.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_known_shape_is_not_compiled_again(params, compilations, deterministic):
    prompts = [[1, 2, 3, 4, 5], [6]]
    again = functools.partial(decode, params, deterministic=deterministic)
    again(prompts)
    assert "jit(generate)" in compilations
    compilations.clear()
    again([[7, 8, 9, 10, 11, 12, 1], [1, 2], [6, 7, 8, 9]])  # the same bucket, and half a batch
    again(prompts, SpdPolicy(threshold=0.6, accept_threshold=0.8))
    again(prompts, gen_length=14, eos_id=3, mask_id=46, seed=2)
    assert compilations == []


def test_only_deterministic_settings_ask_the_compiler_for_it(params, monkeypatch):
    asked = []
    compile_or_load = compiler.compile_or_get_cached

    def note(backend, computation, devices, options, *rest, **details):
        if "generate" in str(computation.operation.attributes["sym_name"]):
            asked.append(dict(options.env_option_overrides).get("xla_gpu_deterministic_ops"))
        return compile_or_load(backend, computation, devices, options, *rest, **details)

    monkeypatch.setattr(compiler, "compile_or_get_cached", note)
    for deterministic in (False, True):
        decode(params, [[1, 2, 3]], gen_length=21, deterministic=deterministic)
    assert asked == [None, True]


def test_a_row_of_padding_decodes_nothing(params):
    prompt_BP, length_B = np.zeros((2, 8), np.int32), np.array([5, 0], np.int32)
    prompt_BP[0, :5] = [1, 2, 3, 4, 5]
    generation = generate(
        params,
        prompt_BP,
        length_B,
        jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(2)),
        gen_length=np.int32(13),
        geometry=Geometry(prefill=4, block_length=4, blocks=5),
        policy=POLICY,
        config=SMALL,
        mask_id=np.int32(SMALL.mask_token_id),
        eos_id=np.int32(SMALL.eos_token_id),
        trace=False,
    )
    forwards, padding = generation.forwards_B.tolist()
    assert forwards >= 5
    assert padding == 0


@pytest.mark.parametrize(
    ("length", "positions"), [(0, 0), (3, 0), (4, 4), (7, 4), (8, 8), (12, 16), (16, 16), (17, 16), (20, 32), (33, 32)]
)
def test_buckets_are_whole_blocks_in_powers_of_two(length, positions):
    assert prefill_bucket(length, 4) == positions


def test_answers_come_in_order_with_their_figures(params):
    prompts = [[1, 2, 3, 4, 5], [6], [7, 8, 9, 10, 11]]
    answers = decode(params, prompts, eos_id=39)
    assert [answer.prompt_ids for answer in answers] == prompts
    for answer, prompt in zip(answers, prompts, strict=True):
        assert len(answer.token_ids) == -(-(len(prompt) + 13) // 4) * 4 - len(prompt)
        assert answer.answer_ids == answer.token_ids[: answer.generated_tokens]
        assert 39 not in answer.answer_ids
        assert answer.token_ids[answer.generated_tokens :][:1] in ([39], [])
        assert answer.tps == answer.generated_tokens / answer.seconds
        assert answer.trace is None
    assert {answer.generated_tokens < len(answer.token_ids) for answer in answers} == {True, False}
    assert answers[0].seconds == answers[1].seconds != answers[2].seconds  # of the whole batch


def test_the_rest_of_the_prompts_gets_the_same_answers(params, compilations):
    prompts = [[first, 2, 3, 4, 5][: 4 + first % 2] for first in range(5)]
    policy = dataclasses.replace(POLICY, temperature=1.0)

    def tokens(prompts, **first):
        return [answer.token_ids for answer in decode_prompts(params, SMALL, prompts, policy, SETTINGS, **first)]

    everything = tokens(prompts)
    compilations.clear()
    for first in (2, 4):
        assert tokens(prompts[first:], first_index=first) == everything[first:]
    assert compilations == []  # the same program, for a last short batch, too
    assert tokens(prompts[4:], first_index=2) != everything[4:]  # noise of another index
    assert tokens([], first_index=5) == []


def test_a_bad_prompt_of_the_rest_is_counted_from_the_first(params):
    with pytest.raises(InputError, match="prompt 5 is empty"):
        next(decode_prompts(params, SMALL, [[1], []], POLICY, SETTINGS, first_index=4))


def test_tokens_per_forward_count_the_prefill():
    answer = Answer([1], [5, 6, 7, 9, 9], generated_tokens=3, forwards=5, seconds=2.0, trace=None)
    assert (answer.tpf, answer.tps, answer.answer_ids) == (0.5, 1.5, [5, 6, 7])


def test_no_prompts_no_answers(params):
    assert decode(params, []) == []


@pytest.mark.parametrize(
    ("bad", "changes", "message"),
    [
        ([], {}, "prompt 1 is empty"),
        ([3, 48], {}, "prompt 1 has id 48, outside the vocabulary of 48"),
        ([3, -1], {}, "prompt 1 has id -1, outside the vocabulary of 48"),
        ([3, SMALL.mask_token_id], {}, "prompt 1 has the mask id 47"),
        ([3, 8], {"mask_id": 8}, "prompt 1 has the mask id 8"),
        ([3] * 116, {}, r"prompt 1 of 116 tokens with gen_length=13 needs 132 positions .* the model has 128"),
    ],
)
def test_a_prompt_that_cannot_be_decoded_is_named_before_anything_is_decoded(params, bad, changes, message):
    settings = dataclasses.replace(SETTINGS, batch_size=1, **changes)
    with pytest.raises(InputError, match=message):
        next(decode_prompts(params, SMALL, [[1, 2, 3], bad], POLICY, settings))


def test_the_longest_prompt_that_fits_is_not_refused():
    check_prompt([3] * 115, 0, SMALL, SETTINGS)


@pytest.mark.parametrize("name", ["gen_length", "block_length", "batch_size"])
def test_senseless_settings_are_refused(name):
    with pytest.raises(InputError, match=f"{name}=0 must be at least 1"):
        DecodeSettings(**{name: 0})
    with pytest.raises(InputError, match="seed=-1"):
        DecodeSettings(seed=-1)


def test_a_listener_hears_of_every_block_with_its_final_tokens(params):
    prompts, heard = [[1, 2, 3, 4, 5], [6], [7, 8, 9]], {}

    def listen(index: int, start: int, tokens: list[int]) -> None:
        assert start not in heard.setdefault(index, {})
        heard[index][start] = tokens

    answers = list(decode_prompts(params, SMALL, prompts, POLICY, SETTINGS, on_block=listen))
    assert answers[0].token_ids == decode(params, prompts)[0].token_ids
    for index, answer in enumerate(answers):
        whole = answer.prompt_ids + answer.token_ids
        assert min(heard[index]) == len(answer.prompt_ids) // 4 * 4
        assert max(heard[index]) + 4 >= len(answer.prompt_ids) + answer.generated_tokens
        for start, tokens in heard[index].items():
            assert tokens == whole[start : start + 4]
