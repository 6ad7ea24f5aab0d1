import dataclasses
import json
import re
import types

import pytest

from dmax_jax import command, decode
from dmax_jax.assets import DEMO
from dmax_jax.checkpoint.layout import load_checkpoint
from dmax_jax.checkpoint.store import save_model
from dmax_jax.data.tokenizer import load_tokenizer
from dmax_jax.decoding import batch
from dmax_jax.decoding.generate import Geometry, generate
from dmax_jax.model.quantisation import quantise_params
from tests.conftest import GOLDEN
from tests.evaluation.random_model import write_random_model

TINY = f"--checkpoint={GOLDEN / 'tiny' / 'checkpoint'}"


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch, tmp_path):
    """Keeps the command from writing into the user's cache; JAX itself has read the variable before."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))


@pytest.fixture
def one_program(monkeypatch):
    """Every case of a method in one compiled program: compiling takes 5 to 10 seconds, decoding 0.1.

    All get the arrays of the largest, and a config that doesn't name the case's end token: that comes beside it.
    """
    largest = Geometry(prefill=16, block_length=8, blocks=6)

    def enlarge(**sizes) -> Geometry:
        own = Geometry(**sizes)
        assert own.block_length == 8
        assert own.prefill <= largest.prefill
        assert own.blocks <= largest.blocks
        return largest

    def lower(*arrays, config, **rest):
        return generate.lower(*arrays, config=dataclasses.replace(config, eos_token_id=0), **rest)

    monkeypatch.setattr(batch, "Geometry", enlarge)
    monkeypatch.setattr(batch, "generate_for", lambda *_, **__: types.SimpleNamespace(lower=lower))


def run(*arguments) -> None:
    command.run(decode.main, decode.FLAGS, decode.__doc__, ["decode", *map(str, arguments)])


def written(tmp_path, *arguments):
    """What the command writes, into a directory that is not there yet."""
    run(*arguments, f"--output={tmp_path / 'new' / 'out.json'}")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.json"]
    return json.loads((tmp_path / "new" / "out.json").read_text())


def golden_cases(name: str) -> list[dict]:
    golden = json.loads((GOLDEN / name / "decode.json").read_text())
    return [{"eos_id": golden["eos_id"], **case} for case in golden["cases"]]


def flags_of(name: str, case: dict) -> list[str]:
    names = ("method", "gen_length", "block_length", "threshold", "low_threshold", "accept_threshold", "eos_id")
    settings = [f"--{name}={case[name]}" for name in names if name in case]
    return [f"--checkpoint={GOLDEN / name / 'checkpoint'}", *settings, "--nofill_leftover_masks", "--dtype=float32"]


def assert_decodes_as_official(tmp_path, name: str, case: dict, *more_flags: str) -> None:
    ids = ",".join(map(str, case["prompt"]))
    out = written(tmp_path, *flags_of(name, case), f"--input_ids={ids}", "--trace", *more_flags)
    about = {key: case[key] for key in case if key not in ("tokens", "trace")}
    assert out["prompt_ids"] == case["prompt"]
    assert out["prompt_ids"] + out["token_ids"] == case["tokens"], about
    assert out["forwards"] == case["forwards"], about
    if case["method"] == "spd":
        names = {"block": "block", "step": "step", "tokens": "token_ids", "stop": "stop"}
        assert [{key: step[ours] for key, ours in names.items()} for step in out["trace"]] == case["trace"], about
    else:
        assert [step["token_ids"] for step in out["trace"]] == case["trace"], about


def test_every_golden_case_is_decoded_as_by_the_official_code(golden, tmp_path, one_program):
    for case in golden_cases(golden.name):
        assert_decodes_as_official(tmp_path, golden.name, case)


# Prefills of 0, 8 and 16 positions, each method.
@pytest.mark.parametrize(("name", "number"), [("tiny", -2), ("grouped", 8), ("calm", 25), ("calm", 0)])
def test_golden_cases_in_arrays_of_their_own_size(name, number, tmp_path):
    assert_decodes_as_official(tmp_path, name, golden_cases(name)[number])


@pytest.mark.parametrize(("name", "number", "devices"), [("tiny", -2, 2), ("calm", 25, 4)])
def test_golden_cases_on_several_devices(name, number, devices, tmp_path):
    assert_decodes_as_official(tmp_path, name, golden_cases(name)[number], f"--mesh=tensor:{devices}")


def test_the_demo_on_several_devices(tmp_path):
    question = "Tom works 6 hours at 7 dollars each. Then Tom pays 5 dollars each for 6 cards. How many are left?"
    flags = [f"--prompt={question}", "--gen_length=64", "--dtype=float32"]
    alone, shared = (written(tmp_path / mesh, *flags, f"--mesh={mesh}") for mesh in ("tensor:1", "tensor:4"))
    assert shared["token_ids"] == alone["token_ids"]
    assert shared["forwards"] == alone["forwards"]


@pytest.mark.parametrize("weights", ["fp8", "bf16"])
def test_8_bit_weights(weights, tmp_path):
    config, params = load_checkpoint(GOLDEN / "tiny" / "checkpoint")
    if weights == "fp8":
        params = quantise_params(params, config, weights)
    save_model(tmp_path / "stored", params, config)
    short = ["--input_ids=5,7,9", "--gen_length=8", "--block_length=8"]
    flagged = written(tmp_path, TINY, *short, f"--weights={weights}")
    stored = written(tmp_path, f"--checkpoint={tmp_path / 'stored'}", *short)
    assert (flagged["weights"], stored["weights"]) == (weights, None)
    assert flagged["token_ids"] == stored["token_ids"]


def test_a_file_of_prompts_and_the_figures(tmp_path, capsys):
    alike = [case for case in golden_cases("tiny") if (case["threshold"], case["gen_length"]) == (0.5, 30)]
    assert len(alike) == 2
    prompts = [*(case["prompt"] for case in alike), alike[1]["prompt"]]
    rows = "\n\n".join(json.dumps({"input_ids": prompt}) for prompt in prompts)
    (tmp_path / "prompts.jsonl").write_text(rows)
    arguments = [*flags_of("tiny", alike[0]), f"--prompts_file={tmp_path / 'prompts.jsonl'}", "--batch_size=2"]
    records = written(tmp_path, *arguments)
    for record, case in zip(records, [*alike, alike[1]], strict=True):
        assert record["prompt_ids"] + record["token_ids"] == case["tokens"]
        assert record["generated_tokens"] == len(record["token_ids"])  # none of them has an end token
        assert record["tpf"] == record["generated_tokens"] / (case["forwards"] + 1)
        assert record["tps"] == record["generated_tokens"] / record["seconds"]
        assert record["text"] is None
        assert "trace" not in record
        settings = {"method": "spd", "threshold": 0.5, "accept_threshold": 0.9, "gen_length": 30, "batch_size": 2}
        assert settings.items() <= record.items()
    screen = capsys.readouterr()
    lines = screen.out.splitlines()
    assert len(lines) == 2 * 3 + 1
    assert [int(token) for token in lines[0].split(",")] == records[0]["token_ids"]
    assert lines[1].startswith(
        f"30 tokens, {alike[0]['forwards']} forwards + prefill, {30 / (alike[0]['forwards'] + 1):.2f} "
    )
    tokens = sum(record["generated_tokens"] for record in records)
    seconds = records[0]["seconds"] + records[2]["seconds"]  # of the first batch and the second
    assert re.fullmatch(rf"together: {tokens} tokens, .*, {tokens / seconds:.1f} tokens/s \(TPS\)", lines[-1])
    assert "3/3" in screen.err  # the progress bar


def test_text_and_conversations(tmp_path, capsys):
    model = write_random_model(tmp_path / "model")
    tokenizer = load_tokenizer(DEMO)
    arguments = [f"--checkpoint={model}", "--method=threshold", "--threshold=0", "--gen_length=8", "--block_length=8"]
    record = written(tmp_path, *arguments, "--prompt=How many pens?")
    assert record["prompt_ids"] == tokenizer.encode_prompt("How many pens?")
    assert record["text"] == tokenizer.decode(record["token_ids"][: record["generated_tokens"]])
    screen = capsys.readouterr()
    assert screen.out.startswith(f"{record['text']}\n{record['generated_tokens']} tokens, {record['forwards']} forw")
    assert "answer" not in screen.err  # one batch: no progress bar
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many pens?"}]
    (tmp_path / "prompts.jsonl").write_text(
        json.dumps({"messages": conversation}) + "\n" + json.dumps({"prompt": "How many pens?"})
    )
    records = written(tmp_path, *arguments, f"--prompts_file={tmp_path / 'prompts.jsonl'}")
    assert records[0]["prompt_ids"] == tokenizer.encode_prompt(conversation)
    assert {**records[1], "seconds": 0, "tps": 0} == {**record, "seconds": 0, "tps": 0}


def test_a_streamed_answer_reads_like_one_that_is_not(tmp_path, capsys, monkeypatch):
    arguments = [TINY, "--input_ids=5,6,7,8,9", "--gen_length=24", "--block_length=8", "--threshold=0"]
    run(*arguments)
    expected = capsys.readouterr().out
    told, tell = [], decode.Stream.__call__
    monkeypatch.setattr(decode.Stream, "__call__", lambda self, *block: (told.append(block), tell(self, *block)))
    run(*arguments, "--stream")
    without_speed = [re.sub(r"[\d.]+ tokens/s", "", text) for text in (capsys.readouterr().out, expected)]
    assert without_speed[0] == without_speed[1]
    assert [(index, start) for index, start, _ in told] == [(0, 8 * block) for block in range(len(told))]


def test_blocks_are_printed_in_their_order_and_whole_characters(capsys):
    model = types.SimpleNamespace(
        tokenizer=types.SimpleNamespace(decode=lambda ids: bytes(ids).decode(errors="replace")),
        config=types.SimpleNamespace(eos_token_id=0),
    )
    text = [*"né".encode()]
    stream = decode.Stream(3, model, batch.DecodeSettings(block_length=2))
    shown = []
    for start, tokens in [(4, text[1:]), (2, [9, text[0]]), (6, [33, 0])]:
        stream(0, start, tokens)
        shown.append(capsys.readouterr().out)
    assert shown == ["", "né", "!"]
    stream = decode.Stream(0, model, batch.DecodeSettings(block_length=2))
    stream(0, 0, text[:2])  # half of the last character
    assert capsys.readouterr().out == "n"


def test_what_is_compared_is_named_and_plays_side_by_side(tmp_path, capsys, monkeypatch):
    names = [write_random_model(tmp_path / name) for name in ("one", "two")]
    loads, load = [], decode.DecodingFlags.load
    monkeypatch.setattr(decode.DecodingFlags, "load", lambda run: loads.append(run.checkpoint) or load(run))
    arguments = ["--method=threshold", "--gen_length=8", "--block_length=8", "--prompt=How many pens?"]
    compared = [f"--checkpoint={names[0]}", f"--checkpoint={names[1]}", "--threshold=0", "--threshold=1"]
    html = tmp_path / "pages" / "out.html"
    records = written(tmp_path, *arguments, *compared, f"--html={html}")
    assert [record["checkpoint"] for record in records] == [str(name) for name in names] == loads
    assert [record["threshold"] for record in records] == [0, 1]
    assert [record["method"] for record in records] == ["threshold"] * 2
    assert records[0]["forwards"] < records[1]["forwards"]
    assert all("trace" not in record for record in records)  # it is the page's alone
    figures = [line for line in capsys.readouterr().out.splitlines() if " forwards + prefill, " in line]
    for line, record in zip(figures, records, strict=True):
        name = f"threshold {record['threshold']:g} ({record['checkpoint']}): "
        assert line.startswith(f"{name}{record['generated_tokens']} tokens, {record['forwards']} forwards + prefill, ")
    assert [path.name for path in html.parent.iterdir()] == ["out.html"]
    data = re.search(r'<script type="application/json".*?>(.*?)</script>', html.read_text(), re.DOTALL)[1]
    (shown,) = json.loads(data)
    assert shown["prompt"] == "How many pens?"
    for run, record in zip(shown["runs"], records, strict=True):
        assert run["text"] == record["text"]
        assert len(run["frames"]) == record["forwards"] + 1
        assert run["frames"][-1]["tokens"] == record["generated_tokens"]
        method, threshold, checkpoint = (record[name] for name in ("method", "threshold", "checkpoint"))
        assert run["settings"] == [f"method={method}", f"threshold={threshold:g}", f"checkpoint={checkpoint}"]


@pytest.mark.parametrize(
    ("arguments", "runs"),
    [
        ("", [("demo", "spd", None)]),
        ("--method=threshold", [("demo", "threshold", None)]),
        ("--method=credit --method=spd", [("demo", "credit", None), ("demo", "spd", None)]),
        ("--method=spd --checkpoint=a --threshold=1 --checkpoint=b", [("a", "spd", 1), ("b", "spd", 1)]),
    ],
)
def test_repeated_flags_are_paired_and_a_single_one_serves_all(arguments, runs):
    def seen():
        found.extend((run.checkpoint, run.method, run.policy().threshold) for run in decode.DECODING.runs())

    found = []
    command.run(seen, decode.FLAGS, decode.__doc__, ["decode", *arguments.split()])
    default = {"spd": 0.5, "threshold": 0.95, "credit": 0.95}
    assert found == [(c, method, default[method] if threshold is None else threshold) for c, method, threshold in runs]


def test_a_prompt_on_the_page_is_without_template():
    tokenizer = load_tokenizer(DEMO)
    assert decode.prompt_text("How?", tokenizer) == "How?"
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How?"}]
    assert decode.prompt_text(conversation, tokenizer) == "system: Be brief.\nuser: How?"
    assert decode.prompt_text(tokenizer.encode("6 cards"), tokenizer) == "6 cards"
    assert decode.prompt_text([5, 7], None) == "5,7"


def error_of(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    screen = capsys.readouterr()
    assert stop.value.code == 2
    assert screen.out == ""
    assert screen.err.count("\n") == 1
    return screen.err


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ("", "exactly one of --prompt, --input_ids and --prompts_file"),
        ("--prompt=a --input_ids=5", "exactly one of"),
        ("--prompt=", "--prompt is empty"),
        ("--input_ids=5,a", "--input_ids=5,a: write token ids"),
        ("--input_ids=", "--input_ids=: write token ids"),
        ("--prompts_file=absent.jsonl", "absent.jsonl: no such file"),
        ("--input_ids=5 --block_length=0", "block_length=0"),
        ("--input_ids=5 --gen_length=0", "gen_length=0"),
        ("--input_ids=5 --batch_size=0", "batch_size=0"),
        ("--input_ids=5 --threshold=2", "threshold=2.0"),
        ("--input_ids=5 --threshold=nan", "threshold=nan"),
        ("--input_ids=5 --accept_threshold=-1", "accept_threshold=-1.0"),
        ("--input_ids=5 --method=hierarchical --low_threshold=7", "low_threshold=7.0"),
        ("--input_ids=5 --temperature=-1", "temperature=-1.0"),
        ("--input_ids=5 --seed=-1", "seed=-1"),
        ("--input_ids=5 --method=fast", "--method=fast"),
        ("--input_ids=5 --gen_length=long", "--gen_length=long"),
        ("--input_ids=5 --colour=red", "colour"),
        ("--input_ids=5 more", "'more'"),
        ("--input_ids=5 --trace", "--trace needs --output"),
        ("--input_ids=5 --threshold=1 --threshold=0 --stream", "--stream is for one prompt"),
        ("--input_ids=5 --method=spd --method=fast", "--method=fast"),
        ("--input_ids=5 --method=spd --threshold=1 --threshold=7", "threshold=7.0"),
        (
            "--input_ids=5 --checkpoint=b --method=spd --method=spd --method=spd",
            "--checkpoint is given 2 times and --method 3: give one, or as many",
        ),
        ("--input_ids=5 --html=dmax_jax", "--html=dmax_jax is a directory"),
        ("--input_ids=5 --html=", "--html= is a directory"),
        ("--input_ids=5 --html=setup.py/out.html", "--html=setup.py/out.html: its directory"),
        ("--input_ids=5 --html=out --output=./out", "--html=out is the file of --output"),
        ("--input_ids=5 --checkpoint=absent", "absent: no such directory"),
        ("--input_ids=5 --output=dmax_jax", "--output=dmax_jax is a directory"),
        ("--input_ids=5 --output=setup.py/out.json", "--output=setup.py/out.json"),
    ],
)
def test_bad_flags_end_before_the_model_is_loaded(arguments, culprit, capsys, monkeypatch):
    monkeypatch.setattr(decode.DECODING, "load", lambda: pytest.fail("loaded"))
    assert culprit in error_of(capsys, TINY, *arguments.split())


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ("--input_ids=5,512", "id 512, outside the vocabulary of 512"),
        ("--input_ids=-1", "id -1, outside"),
        ("--input_ids=511", "mask id 511"),
        ("--input_ids=5 --gen_length=100000", "gen_length=100000"),
        ("--input_ids=5 --eos_id=512", "eos_token_id=512"),
        ("--input_ids=5 --mesh=tensor:99", "tensor=99"),
        ("--input_ids=5 --mesh=tensor:3", "tensor:3 does not divide 4 query heads and 2 key heads"),
        ("--input_ids=5 --mesh=wide", "--mesh=wide: write tensor:N"),
        ("--input_ids=5 --mesh=data:2", "--mesh=data:2: write tensor:N"),
        ("--prompt=Hello", "tokenizer.json is missing"),
    ],
)
def test_what_does_not_fit_the_model_ends_before_decoding(arguments, culprit, capsys, monkeypatch):
    monkeypatch.setattr(batch, "generate_for", lambda *_, **__: pytest.fail("decoded"))
    assert culprit in error_of(capsys, TINY, *arguments.split())


@pytest.mark.parametrize(
    "row",
    ["{", "5", "{}", '{"question": "a"}', '{"prompt": ""}', '{"prompt": "a", "input_ids": [5]}', '{"input_ids": []}',
     '{"input_ids": [true]}', '{"messages": []}', '{"messages": [{"role": "user"}]}', '{"prompt": "\udcff"}',
     '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'],
)  # fmt: skip
def test_a_bad_row_is_named(row, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\n' + row.encode(errors="surrogateescape"))
    assert f"{path}, line 3: " in error_of(capsys, TINY, f"--prompts_file={path}")


def test_a_file_without_rows_is_refused(tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text("\n")
    assert "the file has no prompt" in error_of(capsys, TINY, f"--prompts_file={tmp_path / 'prompts.jsonl'}")
