import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax import command
from dmax_jax.decoding.prediction import predict
from dmax_jax.model.masks import block_causal_mask
from dmax_jax.model.params import Moe
from dmax_jax.model.soft_embedding import soft_embedding
from dmax_jax.model.transformer import embed, transformer, unembed
from tests.models import SMALL, golden_model, random_params, small_model

torch = pytest.importorskip("torch")

from tests.measuring import pytorch_peer as peer  # noqa: E402, it needs torch

BLOCK = 4
PROBLEM = peer.Problem(batch_size=2, block_length=BLOCK, context=8, repeats=2)
CPU = torch.device("cpu")


def three_layers():
    """Two sparse layers; norms and router biases that change something."""
    config = small_model(num_hidden_layers=3)
    rng = np.random.default_rng(1)

    def disturbed(leaf):
        return leaf if leaf.ndim > 1 else leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32)

    return config, jax.tree.map(disturbed, random_params(config))


MODELS = {"three layers": three_layers, "golden": lambda: golden_model("grouped")}


def peer_weights(params, config) -> peer.Weights:
    """The same weights in the peer's layout."""

    def tensor(*parts) -> torch.Tensor:
        return torch.from_numpy(np.array(np.concatenate(parts)))

    def mlp(mlp) -> peer.Mlp:
        return peer.Mlp(tensor(mlp.gate, mlp.up), tensor(mlp.down))

    def moe(moe: Moe) -> peer.Moe:
        gate_EDF, up_EDF, down_EFD = (
            tensor(matrix).transpose(1, 2) for matrix in (moe.experts.gate, moe.experts.up, moe.experts.down)
        )
        experts = peer.Mlp(torch.cat([gate_EDF, up_EDF], dim=-1), down_EFD.contiguous())
        return peer.Moe(tensor(moe.router), tensor(moe.expert_bias), experts, mlp(moe.shared))

    def layer(layer) -> peer.Layer:
        heads = (
            (layer.attention.q_norm, config.num_attention_heads),
            (layer.attention.k_norm, config.num_key_value_heads),
        )
        return peer.Layer(
            tensor(layer.attention_norm),
            tensor(layer.attention.qkv),
            tensor(*(np.tile(norm_H, (count, 1)) for norm_H, count in heads)),
            tensor(layer.attention.out),
            tensor(layer.mlp_norm),
            moe(layer.mlp) if isinstance(layer.mlp, Moe) else mlp(layer.mlp),
        )

    return peer.Weights(
        tensor(params.embed), tuple(map(layer, params.layers)), tensor(params.norm), tensor(params.head)
    )


def empty_cache(config, batch: int, capacity: int) -> peer.Cache:
    shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
    return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]


def grouped_or_skip():
    """torch._grouped_mm, if this PyTorch runs it on a CPU, too."""
    try:
        torch._grouped_mm(torch.ones(2, 16), torch.ones(1, 16, 16), torch.tensor([2], dtype=torch.int32))
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"no torch._grouped_mm on a CPU: {error}")
    return torch._grouped_mm


@pytest.mark.parametrize("product", ["looped", "grouped"])
@pytest.mark.parametrize("model", MODELS)
def test_logits_equal_the_projects(model, product, monkeypatch):
    """Its blocks one after the other over the cache; the project's all at once under a mask."""
    if product == "grouped":
        grouped = grouped_or_skip()
        monkeypatch.setattr(peer, "grouped_product", lambda device: grouped)
    config, params = MODELS[model]()
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, 4 * BLOCK))

    @jax.jit
    def project_logits(params):
        positions, mask = jnp.arange(4 * BLOCK)[None], block_causal_mask(4 * BLOCK, BLOCK)
        return unembed(params, transformer(params, embed(params, tokens_BT), positions, mask, config).hidden_BTD)

    weights, cache = peer_weights(params, config), empty_cache(config, 2, 4 * BLOCK)
    logits = []
    for start in range(0, 4 * BLOCK, BLOCK):
        tables = peer.make_tables(config, start, BLOCK, torch.float32, CPU)
        x_BTD = weights.embed[torch.from_numpy(tokens_BT[:, start : start + BLOCK])]
        logits.append(peer.forward(weights, x_BTD, cache, tables, config, context=start)[0])
    np.testing.assert_allclose(
        torch.cat(logits, 1), project_logits(jax.tree.map(jnp.asarray, params)), atol=1e-4, rtol=0
    )


def test_next_embeddings_equal_the_projects():
    rng = np.random.default_rng(0)
    logits_BTV = rng.normal(scale=3, size=(2, BLOCK, 48)).astype(np.float32)
    embed_VD = rng.normal(size=(48, 32)).astype(np.float32)
    own = predict(jnp.asarray(logits_BTV), mask_id=47)
    expected = soft_embedding(embed_VD[own.tokens_BW], jnp.asarray(embed_VD[47]), own.confidence_BW)
    found = peer.next_embeddings(torch.from_numpy(logits_BTV), torch.from_numpy(embed_VD), 47)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_every_row_takes_experts_of_its_own():
    weights = peer.random_weights(SMALL, 600, torch.float32, torch.Generator().manual_seed(0))
    ids_MX, weights_MX = peer.choose_experts(torch.ones(600, SMALL.hidden_size), weights.layers[1].mlp, SMALL)
    np.testing.assert_allclose(np.bincount(ids_MX.flatten(), minlength=6), 600 * 2 / 6, rtol=0.25)
    assert len(ids_MX.sort().values.unique(dim=0)) > 6
    np.testing.assert_allclose(weights_MX.sum(1), SMALL.routed_scaling_factor, rtol=1e-5)


def test_required_bytes_by_hand():
    D, V, F, E = 32, 48, 16, 6
    weights = peer.random_weights(SMALL, PROBLEM.rows, torch.float32, torch.Generator().manual_seed(0))
    needed = peer.required_bytes(weights, SMALL, PROBLEM, [5])
    attention = (4 + 2 * 2) * 8 * D + D * 4 * 8 + (4 + 2) * 8
    dense, sparse = 3 * D * 48, E * D + PROBLEM.rows * E + 3 * D * F
    assert needed == {
        "experts": 5 * 3 * D * F * 4,
        "other_weights": 4 * (2 * (attention + 2 * D) + dense + sparse + D),
        "head": V * D * 4,
        "cache": 2 * 2 * 8 * (2 * 2 * 8 * 4),
        "total": sum(list(needed.values())[:-1]),
    }


def run(*arguments):
    command.run(peer.main, peer.FLAGS, peer.__doc__, ["pytorch_peer", *arguments])


def config_file(tmp_path) -> str:
    file = tmp_path / "config.py"
    file.write_text(
        "from dmax_jax.config import DataConfig, RunConfig\nfrom tests.models import SMALL\n\n\n"
        'def get_config():\n    return RunConfig(model=SMALL, data=DataConfig(path="a"), steps=1, batch_size=1)\n'
    )
    return f"--config={file}"


def test_figures_on_a_cpu(tmp_path, capsys):
    output = tmp_path / "figures.json"
    run(config_file(tmp_path), "--device=cpu", "--block_length=4", "--context=8", "--repeats=2", f"--output={output}")
    record = json.loads(output.read_text())
    assert record["graph_ms"] is None
    assert 0 < record["eager_ms"] <= record["slowest_eager_ms"]
    assert record["active_experts"] == [pytest.approx(4, abs=2)]
    assert record["bandwidth"] == pytest.approx(1e3 * record["required_bytes"]["total"] / record["eager_ms"])
    printed = capsys.readouterr().out
    assert f"{record['eager_ms']:.3f} ms (median of 2" in printed
    assert "1 x 4 positions per forward after 8 positions" in printed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a graph needs a GPU")
def test_a_replayed_graph_does_what_the_step_does():
    generator = torch.Generator("cuda").manual_seed(0)
    weights = peer.random_weights(SMALL, PROBLEM.rows, torch.bfloat16, generator)
    cache = peer.random_cache(SMALL, PROBLEM, torch.bfloat16, generator)
    tables = peer.make_tables(SMALL, PROBLEM.context, BLOCK, torch.bfloat16, torch.device("cuda"))
    x_BTD = torch.zeros(2, BLOCK, SMALL.hidden_size, dtype=torch.bfloat16, device="cuda")
    logits_BTV = torch.zeros(2, BLOCK, SMALL.vocab_size, device="cuda")

    def step():
        logits_BTV.copy_(peer.forward(weights, x_BTD, cache, tables, SMALL, context=PROBLEM.context)[0])

    graph = peer.capture(step)
    x_BTD.copy_(weights.embed[torch.arange(2 * BLOCK, device="cuda")].reshape(x_BTD.shape))
    step()
    expected = logits_BTV.clone()
    logits_BTV.zero_()
    graph.replay()
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(logits_BTV, expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=nowhere.py"], "--config=nowhere.py: no such file"),
        (["--config=configs/stories_oput.py"], "the run starts from a checkpoint"),
        (["--context=0"], "context"),
        (["--device=tpu"], "device"),
        (["decode"], "unexpected argument 'decode'"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the error says is missing")
def test_no_gpu_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(config_file(tmp_path))
    assert "PyTorch sees no GPU; --device=cpu runs small models" in capsys.readouterr().err
