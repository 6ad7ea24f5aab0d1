import json

import pytest

from dmax_jax import benchmark, command
from tests.conftest import GOLDEN

CONFIG = """
from dmax_jax.config import DataConfig, RunConfig
from tests.models import SMALL

def get_config():
    return RunConfig(model=SMALL, data=DataConfig(path="answers.jsonl"), steps=1, batch_size=1)
"""
SIZES = ["--block_length=4", "--context=8", "--blocks=2", "--steps_per_block=2", "--repeats=2"]


def run(*arguments):
    argv = ["benchmark", *arguments, "--bandwidth_bytes=1000000"]
    command.run(benchmark.main, benchmark.FLAGS, benchmark.__doc__, argv, verbs=("decode",))


def test_figures_of_random_weights_on_two_devices(tmp_path, capsys):
    config, output, profile = tmp_path / "config.py", tmp_path / "figures.json", tmp_path / "profile"
    config.write_text(CONFIG)
    run("decode", f"--config={config}", "--mesh=tensor:2", *SIZES, f"--output={output}", f"--profile={profile}")
    record = json.loads(output.read_text())
    assert record["devices"] == 2
    assert record["parameters"] == 24966
    assert record["active_experts"] == [pytest.approx(5, abs=1)]
    assert record["limit_ms"] == pytest.approx(1e3 * record["required_bytes"]["total"] / record["bandwidth"])
    assert record["fraction_of_limit"] == pytest.approx(record["limit_ms"] / record["ms_per_forward"])
    assert record["tps"] == pytest.approx(6.2e3 / record["ms_per_forward"])
    assert any(profile.rglob("*.xplane.pb"))
    printed = capsys.readouterr().out
    assert f"{record['ms_per_forward']:.3f} ms (median of 2" in printed
    assert "24,966 parameters, bfloat16, uniform routing" in printed


def test_several_batch_sizes_and_their_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    output, plot = tmp_path / "figures.json", tmp_path / "new" / "figures.png"
    tiny = f"--checkpoint={GOLDEN / 'tiny' / 'checkpoint'}"
    run("decode", tiny, "--batch_size=2,1", *SIZES, "--dtype=float32", f"--output={output}", f"--plot={plot}")
    records = json.loads(output.read_text())
    assert [record["batch_size"] for record in records] == [2, 1]
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split()[:2] == ["rows", "ms/forward"]
    assert [line.split()[:2] for line in lines] == [
        [str(record["batch_size"]), f"{record['ms_per_forward']:.3f}"] for record in records
    ]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_with_its_own_routing(capsys):
    run("decode", f"--checkpoint={GOLDEN / 'tiny' / 'checkpoint'}", "--routing=model", "--dtype=float32", *SIZES)
    assert "float32, model routing" in capsys.readouterr().out


@pytest.mark.parametrize(("source", "kind"), [("config", "int8"), ("checkpoint", "fp8")])
def test_8_bit_weights(source, kind, tmp_path, capsys):
    config, output = tmp_path / "config.py", tmp_path / "figures.json"
    config.write_text(CONFIG)
    model = {"config": f"--config={config}", "checkpoint": f"--checkpoint={GOLDEN / 'tiny' / 'checkpoint'}"}[source]
    heads = []
    for weights in ("bf16", kind):
        run("decode", model, *SIZES, "--repeats=1", f"--weights={weights}", f"--output={output}")
        record = json.loads(output.read_text())
        assert record["weights"] == ("bfloat16" if weights == "bf16" else weights)
        heads.append(record["required_bytes"]["head"])
        described = "bfloat16, " if weights == "bf16" else f"bfloat16 with {weights} weights,"
        assert described in capsys.readouterr().out
    rows = 48 if source == "config" else heads[0] / 2 / 64
    assert heads[1] == heads[0] / 2 + 4 * rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the first argument says what to do: decode"),
        (["deocde"], "the first argument says what to do: decode"),
        (["decode"], "give either --config (random weights) or --checkpoint"),
        (["decode", "--checkpoint=demo", "--blocks=0"], "blocks=0 must be at least 1"),
        (["decode", "--checkpoint=demo", "--batch_size=4,x"], "--batch_size=4,x: write numbers, such as 1,2,4"),
        (["decode", "--checkpoint=demo", "--batch_size="], "--batch_size=: write numbers"),
        (["decode", "--checkpoint=demo", "--batch_size=1,0"], "batch_size=0 must be at least 1"),
        (["decode", "--checkpoint=demo", "--plot=dmax_jax"], "--plot=dmax_jax is a directory"),
        (["decode", "--checkpoint=demo", "--mesh=tensor:99"], "needs 99 devices; there are 8"),
        (["decode", "--checkpoint=demo", "--mesh=data:2"], "--mesh=data:2: write tensor:N"),
        (["decode", "--config=configs/stories_oput.py"], "the run starts from a checkpoint"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
