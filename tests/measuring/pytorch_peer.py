"""Times one decoding forward in PyTorch, as a peer to measure dmax_jax.benchmark against.

  python -m tests.measuring.pytorch_peer --config=configs/llada2_mini.py
  python -m tests.measuring.pytorch_peer --batch_size=2 --context=1024 --output=FILE.json

The same work by PyTorch's own means: fused projections, scaled_dot_product_attention over a cache, routed experts as
torch._grouped_mm, the whole forward in one CUDA graph. A forward takes one block per row after `context` cached
positions; the mix of its predictions and the mask is the input of the next one. Weights are random, and every row is
routed to experts of its own. Needs PyTorch 2.11 or newer and a Hopper GPU; --device=cpu runs small models without a
graph.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from absl import flags

from dmax_jax import command
from dmax_jax.config import ModelConfig, load_config
from dmax_jax.errors import InputError
from dmax_jax.output_file import prepare_output, write_json

FORWARDS = 20  # between two readings of the clock

FLAGS = flags.FlagValues()
CONFIG = flags.DEFINE_string(
    "config", "configs/llada2_mini.py", "File whose model gets random weights.", flag_values=FLAGS
)
SIZES = {
    name: flags.DEFINE_integer(name, default, text, lower_bound=1, flag_values=FLAGS)
    for name, default, text in (
        ("batch_size", 1, "Rows decoded together."),
        ("block_length", 32, "Positions of a block."),
        ("context", 512, "Positions in the cache."),
        ("repeats", 5, f"How often {FORWARDS} forwards are timed."),
    )
}
DEVICE = flags.DEFINE_enum("device", "cuda", ["cuda", "cpu"], "Where it runs.", flag_values=FLAGS)
SEED = flags.DEFINE_integer("seed", 0, "Of weights, cache and routing.", lower_bound=0, flag_values=FLAGS)
OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.", flag_values=FLAGS)


@dataclasses.dataclass(frozen=True)
class Problem:
    batch_size: int = 1
    block_length: int = 32
    context: int = 512
    repeats: int = 5

    @property
    def rows(self) -> int:
        return self.batch_size * self.block_length


@dataclasses.dataclass(frozen=True)
class Mlp:
    gate_up: torch.Tensor  # [2 F, D], or [E, D, 2 F] for the routed experts of a layer
    down: torch.Tensor  # [D, F], or [E, F, D]


@dataclasses.dataclass(frozen=True)
class Moe:
    router: torch.Tensor  # [E, D], float32
    expert_bias: torch.Tensor  # [E], or [M, E] for a bias of every row's own; float32
    experts: Mlp
    shared: Mlp


@dataclasses.dataclass(frozen=True)
class Layer:
    attention_norm: torch.Tensor  # [D]
    qkv: torch.Tensor  # [(N + 2 K) H, D]
    qk_norm: torch.Tensor  # [N + K, H]: the queries' norm for every query head, then the keys'
    out: torch.Tensor  # [D, N H]
    mlp_norm: torch.Tensor  # [D]
    mlp: Mlp | Moe


@dataclasses.dataclass(frozen=True)
class Weights:
    embed: torch.Tensor  # [V, D]
    layers: tuple[Layer, ...]
    norm: torch.Tensor  # [D]
    head: torch.Tensor  # [V, D]


Cache = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of every layer, [B, K, S, H]


@dataclasses.dataclass(frozen=True)
class Tables:
    """What no forward has to compute: a rotation by halves as one product with each half's partner; expert numbers."""

    cos_T1H: torch.Tensor
    sin_T1H: torch.Tensor  # negative in the first half; 0 where nothing is rotated
    partner_H: torch.Tensor
    experts_E: torch.Tensor


def make_tables(config: ModelConfig, start: int, length: int, dtype: torch.dtype, device: torch.device) -> Tables:
    """For `length` positions from `start` on."""
    half, rest = config.rotary_dim // 2, config.head_dim - config.rotary_dim
    frequencies_R = config.rope_theta ** (-torch.arange(0, 2 * half, 2, dtype=torch.float32) / config.rotary_dim)
    angles_TR = torch.arange(start, start + length, dtype=torch.float32)[:, None] * frequencies_R
    cos_TR, sin_TR = angles_TR.cos(), angles_TR.sin()
    cos_TH = torch.cat([cos_TR, cos_TR, torch.ones(length, rest)], -1)
    sin_TH = torch.cat([-sin_TR, sin_TR, torch.zeros(length, rest)], -1)
    partner_H = torch.arange(config.head_dim)
    partner_H[: 2 * half] = partner_H[: 2 * half].roll(half)
    return Tables(
        cos_TH[:, None].to(device, dtype),
        sin_TH[:, None].to(device, dtype),
        partner_H.to(device),
        torch.arange(config.num_experts, device=device),
    )


def forward(
    weights: Weights, x_BTD: torch.Tensor, cache: Cache, tables: Tables, config: ModelConfig, *, context: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Runs T positions that see `context` cached ones and each other, and writes their keys and values behind those.

    Returns the logits [B, T, V] in float32 and the experts that rows chose, [M, X] per sparse layer.
    """
    B, _, D = x_BTD.shape
    x_MD = x_BTD.reshape(-1, D).clone()  # the residual stream: products add to it in place, with no program for the sum
    chosen = []
    for layer, kv in zip(weights.layers, cache, strict=True):
        normal_MD = F.rms_norm(x_MD, (D,), layer.attention_norm, config.rms_norm_eps)
        x_MD.addmm_(attention(normal_MD, layer, kv, tables, config, B, context), layer.out.T)
        normal_MD = F.rms_norm(x_MD, (D,), layer.mlp_norm, config.rms_norm_eps)
        if isinstance(layer.mlp, Mlp):
            add_mlp(x_MD, normal_MD, layer.mlp)
        else:
            chosen.append(add_moe(x_MD, normal_MD, layer.mlp, tables, config))
    logits_MV = unembed(F.rms_norm(x_MD, (D,), weights.norm, config.rms_norm_eps), weights.head)
    return logits_MV.reshape(B, -1, config.vocab_size), chosen


def attention(
    x_MD: torch.Tensor,
    layer: Layer,
    kv: tuple[torch.Tensor, torch.Tensor],
    tables: Tables,
    config: ModelConfig,
    batch: int,
    context: int,
) -> torch.Tensor:
    """The heads' outputs side by side, [M, N H]; the new keys and values are written to the cache."""
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    qkv_BTNH = F.linear(x_MD, layer.qkv).reshape(batch, -1, N + 2 * K, H)
    qk_BTNH, v_BTKH = qkv_BTNH.split((N + K, K), dim=2)
    qk_BTNH = F.rms_norm(qk_BTNH, (H,), eps=config.rms_norm_eps) * layer.qk_norm
    partner_BTNH = qk_BTNH.index_select(-1, tables.partner_H)
    qk_BTNH = torch.addcmul(qk_BTNH * tables.cos_T1H, partner_BTNH, tables.sin_T1H)
    q_BTNH, k_BTKH = qk_BTNH.split((N, K), dim=2)
    seen = context + q_BTNH.shape[1]
    for cached_BKSH, new_BTKH in zip(kv, (k_BTKH, v_BTKH), strict=True):
        cached_BKSH[:, :, context:seen].copy_(new_BTKH.transpose(1, 2))
    k_BKSH, v_BKSH = (cached_BKSH[:, :, :seen] for cached_BKSH in kv)
    out_BNTH = F.scaled_dot_product_attention(q_BTNH.transpose(1, 2), k_BKSH, v_BKSH, enable_gqa=True)
    return out_BNTH.transpose(1, 2).reshape(-1, N * H)


def add_mlp(sum_MD: torch.Tensor, x_MD: torch.Tensor, mlp: Mlp) -> None:
    sum_MD.addmm_(gated(F.linear(x_MD, mlp.gate_up)), mlp.down.T)


def gated(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def add_moe(sum_MD: torch.Tensor, x_MD: torch.Tensor, moe: Moe, tables: Tables, config: ModelConfig) -> torch.Tensor:
    """Adds the outputs of the shared and of the chosen experts; returns which were chosen, [M, X]."""
    add_mlp(sum_MD, x_MD, moe.shared)
    ids_MX, weights_MX = choose_experts(x_MD, moe, config)
    sorted_P, order_P = ids_MX.reshape(-1).sort()  # P = M X pairs of a row and an expert
    # The count of pairs up to every expert. torch.bincount would wait for the GPU, which a graph can't hold.
    ends_E = torch.searchsorted(sorted_P, tables.experts_E, right=True, out_int32=True)
    product = grouped_product(x_MD.device)
    pairs_PD = x_MD[order_P // config.num_experts_per_tok]
    pairs_PD = product(gated(product(pairs_PD, moe.experts.gate_up, ends_E)), moe.experts.down, ends_E)
    out_MXD = torch.empty_like(pairs_PD).index_copy_(0, order_P, pairs_PD).reshape(*ids_MX.shape, -1)
    sum_MD[:, None].baddbmm_(weights_MX[:, None].to(x_MD.dtype), out_MXD)
    return ids_MX


def choose_experts(x_MD: torch.Tensor, moe: Moe, config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row's experts and its weights in them, [M, X]: groups first, then experts, as model/router.py does."""
    scores_ME = F.linear(x_MD.float(), moe.router).sigmoid()
    biased_MGE = (scores_ME + moe.expert_bias).unflatten(1, (config.n_group, -1))
    pair_MG = biased_MGE.topk(min(2, biased_MGE.shape[-1]), sorted=False).values.sum(-1)
    kept_MG = pair_MG.topk(config.topk_group, sorted=False).indices
    dropped_MG = torch.ones_like(pair_MG, dtype=torch.bool).scatter_(1, kept_MG, False)
    reachable_ME = biased_MGE.masked_fill(dropped_MG[:, :, None], -torch.inf).flatten(1)
    ids_MX = reachable_ME.topk(config.num_experts_per_tok, sorted=False).indices
    weights_MX = scores_ME.gather(1, ids_MX)
    return ids_MX, weights_MX / (weights_MX.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor


def grouped_product(device: torch.device) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The product of rows sorted by expert with their experts' matrices: [P, D], [E, D, F], ends [E] to [P, F]."""
    return torch._grouped_mm if device.type == "cuda" else looped_product


def looped_product(pairs_PD: torch.Tensor, matrices_EDF: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    parts = pairs_PD.tensor_split(ends_E[:-1].tolist())
    return torch.cat([part @ matrix_DF for part, matrix_DF in zip(parts, matrices_EDF, strict=True)])


def unembed(x_MD: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
    """Logits in float32, without rounding them first where PyTorch can."""
    if x_MD.device.type == "cuda" and x_MD.dtype != torch.float32:
        return torch.mm(x_MD, head_VD.T, out_dtype=torch.float32)
    return F.linear(x_MD, head_VD).float()


def next_embeddings(logits_BTV: torch.Tensor, embed_VD: torch.Tensor, mask_id: int) -> torch.Tensor:
    """The predicted tokens' embeddings, mixed with the mask's by confidence: model/soft_embedding.py. Float32."""
    confidence_BT, tokens_BT = logits_BTV.softmax(-1).max(-1)
    token_BTD, mask_D = embed_VD[tokens_BT].float(), embed_VD[mask_id].float()
    p_BT1 = confidence_BT[:, :, None]
    mixed_BTD = torch.lerp(mask_D, token_BTD, p_BT1)
    target_BT1 = torch.lerp(mask_D.norm(), token_BTD.norm(dim=-1, keepdim=True), p_BT1)
    return mixed_BTD * (target_BT1 / (mixed_BTD.norm(dim=-1, keepdim=True) + 1e-6))


def random_weights(config: ModelConfig, rows: int, dtype: torch.dtype, generator: torch.Generator) -> Weights:
    """Normal matrices of standard deviation D**-0.5, unit norms, and uniform routing of `rows` rows.

    A random bias for every row and expert, which outweighs the router, does the latter: measuring/weights.py.
    """
    D, H, E = config.hidden_size, config.head_dim, config.num_experts
    N, K, width = config.num_attention_heads, config.num_key_value_heads, config.moe_intermediate_size
    device = generator.device

    def matrix(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, D**-0.5, generator=generator)

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    def mlp(width: int) -> Mlp:
        return Mlp(matrix(2 * width, D), matrix(D, width))

    def moe() -> Moe:
        return Moe(
            router=matrix(E, D, dtype=torch.float32),
            expert_bias=1000 * torch.rand(rows, E, device=device, generator=generator),
            experts=Mlp(matrix(E, D, 2 * width), matrix(E, width, D)),
            shared=mlp(width * config.num_shared_experts),
        )

    def layer(index: int) -> Layer:
        return Layer(
            attention_norm=ones(D),
            qkv=matrix(config.qkv_rows, D),
            qk_norm=ones(N + K, H),
            out=matrix(D, N * H),
            mlp_norm=ones(D),
            mlp=mlp(config.intermediate_size) if index < config.first_k_dense_replace else moe(),
        )

    layers = tuple(layer(index) for index in range(config.num_hidden_layers))
    return Weights(matrix(config.vocab_size, D), layers, ones(D), matrix(config.vocab_size, D))


def random_cache(config: ModelConfig, problem: Problem, dtype: torch.dtype, generator: torch.Generator) -> Cache:
    capacity = problem.context + problem.block_length
    shape = (problem.batch_size, config.num_key_value_heads, capacity, config.head_dim)
    values = torch.empty((config.num_hidden_layers, 2, *shape), dtype=dtype, device=generator.device)
    return [(k_BKSH, v_BKSH) for k_BKSH, v_BKSH in values.normal_(generator=generator)]


@torch.inference_mode()
def measure(
    config: ModelConfig, problem: Problem, *, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> dict:
    """Times the forward on random weights; `graph_ms` is None without a GPU. Times are medians over the repeats."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = random_weights(config, problem.rows, dtype, generator)
    cache = random_cache(config, problem, dtype, generator)
    tables = make_tables(config, problem.context, problem.block_length, dtype, device)
    x_BTD = weights.embed[config.mask_token_id].repeat(problem.batch_size, problem.block_length, 1)

    def step() -> list[torch.Tensor]:
        logits_BTV, chosen = forward(weights, x_BTD, cache, tables, config, context=problem.context)
        x_BTD.copy_(next_embeddings(logits_BTV, weights.embed, config.mask_token_id))
        return chosen

    active = [ids_MX.unique().numel() for ids_MX in step()]
    eager_ms = milliseconds(step, problem.repeats, device)
    graph_ms = milliseconds(capture(step).replay, problem.repeats, device) if device.type == "cuda" else None
    if not x_BTD.isfinite().all():
        raise FloatingPointError("the forwards ended in numbers that are not finite: the times mean nothing")
    needed = required_bytes(weights, config, problem, active)
    times = graph_ms or eager_ms
    return {
        "weight_bytes": tensor_bytes(weights),
        "graph_ms": statistics.median(graph_ms) if graph_ms else None,
        "slowest_graph_ms": max(graph_ms) if graph_ms else None,
        "eager_ms": statistics.median(eager_ms),
        "slowest_eager_ms": max(eager_ms),
        "active_experts": active,
        "required_bytes": needed,
        "bandwidth": 1e3 * needed["total"] / statistics.median(times),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def milliseconds(run: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Of one forward, a figure for each repeat; one that doesn't count comes first."""
    times = []
    for _ in range(1 + repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(FORWARDS):
                run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / FORWARDS)
        else:
            begun = time.perf_counter()
            for _ in range(FORWARDS):
                run()
            times.append(1e3 * (time.perf_counter() - begun) / FORWARDS)
    return times[1:]


def capture(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The step as one graph. A warm-up on a stream of its own comes first, as PyTorch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def required_bytes(weights: Weights, config: ModelConfig, problem: Problem, active: list[int]) -> dict[str, float]:
    """What a forward reads if it reads nothing twice, counted as measuring/decoding.py does."""
    sparse = [layer.mlp for layer in weights.layers if isinstance(layer.mlp, Moe)]
    all_experts = [tensor_bytes(moe.experts) for moe in sparse]
    position = 2 * config.num_key_value_heads * config.head_dim * weights.embed.element_size()
    needed = {
        "experts": sum(size * count / config.num_experts for size, count in zip(all_experts, active, strict=True)),
        "other_weights": tensor_bytes(weights.layers) - sum(all_experts) + weights.norm.nbytes,
        "head": weights.head.nbytes,
        "cache": problem.batch_size * problem.context * config.num_hidden_layers * position,
    }
    return needed | {"total": sum(needed.values())}


def tensor_bytes(tree: object) -> int:
    """Of all tensors in dataclasses and tuples."""
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    parts = tree if isinstance(tree, tuple) else vars(tree).values()
    return sum(map(tensor_bytes, parts))


def main() -> None:
    problem = Problem(**{name: flag.value for name, flag in SIZES.items()})
    output = prepare_output(OUTPUT.value) if OUTPUT.value else None
    config = load_config(CONFIG.value).model
    if config is None:
        raise InputError(f"--config={CONFIG.value}: the run starts from a checkpoint; its file names no model")
    device = torch.device(DEVICE.value)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("PyTorch sees no GPU; --device=cpu runs small models")
    # Below 9.0, torch._grouped_mm waits for the GPU, which a graph can't hold.
    if device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        raise InputError(
            f"{torch.cuda.get_device_name()} is older than Hopper, the first that torch._grouped_mm is for"
        )
    try:
        measured = measure(config, problem, device=device, seed=SEED.value)
    except torch.OutOfMemoryError as error:
        raise InputError(f"the model doesn't fit on the device: {error}") from None
    record = {
        "config": CONFIG.value,
        "seed": SEED.value,
        "dtype": "bfloat16",
        **dataclasses.asdict(problem),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        **measured,
    }
    if output:
        write_json(output, record, indent=1)
    print(table(record))


def table(record: dict) -> str:
    """The record for a reader, one figure a line."""
    active, required = record["active_experts"], record["required_bytes"]

    def forward_time(kind: str) -> str:
        if record[f"{kind}_ms"] is None:
            return "none without a GPU"
        slowest = record[f"slowest_{kind}_ms"]
        return f"{record[f'{kind}_ms']:.3f} ms (median of {record['repeats']}, slowest {slowest:.3f})"

    rows = {
        "model": f"{record['weight_bytes'] / 1e9:.3f} GB of weights, {record['dtype']}, uniform routing",
        "device": f"{record['device']}, torch {record['torch']}",
        "problem": f"{record['batch_size']} x {record['block_length']} positions per forward after "
        f"{record['context']} positions",
        "graph": forward_time("graph"),
        "eager": forward_time("eager"),
        "bandwidth": f"{record['bandwidth'] / 1e12:.3f} TB/s reached: {required['total'] / 1e9:.3f} GB per forward",
        "reads": ", ".join(f"{name} {required[name] / 1e9:.3f}" for name in required if name != "total") + " GB",
        "active experts": f"{statistics.mean(active):.1f} per sparse layer ({min(active)} to {max(active)})"
        if active
        else "none: no layer is sparse",
        "peak memory": "not told on a CPU" if record["peak_bytes"] is None else f"{record['peak_bytes'] / 1e9:.2f} GB",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


if __name__ == "__main__":
    command.run(main, FLAGS, __doc__)
