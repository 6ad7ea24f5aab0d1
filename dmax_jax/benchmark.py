"""Measures how fast a model decodes, against what the devices' memory would allow.

  python -m dmax_jax.benchmark decode --config=configs/llada2_mini.py
  python -m dmax_jax.benchmark decode --checkpoint=DIR --batch_size=8 --context=1024 --output=FILE.json
  python -m dmax_jax.benchmark decode --config=configs/llada2_mini.py --batch_size=1,4,16,64 --plot=FILE.png

Runs the generate loop of `decode` (soft parallel decoding) on random prompts, with a fixed number of forwards per
block, on a checkpoint or on random weights of a configuration's model. After a warm-up it prints the median time of a
forward, how many experts a forward runs, the bytes it has to read, and the time that reading them takes at the
bandwidth measured in the same process: the limit. --routing=uniform sends every row to experts of its own choice, as in
a model whose experts are balanced; random weights alone would make similar rows share theirs.

The first block and the prefill are timed apart. Compilation is not part of any time but its own. With --mesh=tensor:2
two GPUs share the model. Several batch sizes share one start; each prints its line as it is done, and the JSON is a
list.
"""

import dataclasses
import time
from typing import Any

import jax
from absl import flags

from dmax_jax import command
from dmax_jax.assets import checkpoint_directory
from dmax_jax.checkpoint.layout import load_checkpoint
from dmax_jax.compilation_cache import use_compilation_cache
from dmax_jax.config import ModelConfig, load_config
from dmax_jax.decoding_flags import MESH_HELP, WEIGHTS_HELP, WEIGHTS_KINDS, parse_mesh
from dmax_jax.errors import InputError
from dmax_jax.kernels.hopper import has_hopper
from dmax_jax.kernels.quantised_weight import KINDS
from dmax_jax.measuring.bandwidth import read_bandwidth
from dmax_jax.measuring.decoding import DecodeProblem, required_bytes, time_decoding
from dmax_jax.measuring.plots import plot_batches
from dmax_jax.measuring.weights import random_params, route_uniformly
from dmax_jax.model.params import Params, count_params
from dmax_jax.model.quantisation import weights_kind
from dmax_jax.output_file import prepare_output, write_json
from dmax_jax.sharding import Mesh, make_mesh
from dmax_jax.study.plots import require_matplotlib

FLAGS = flags.FlagValues()
CONFIG = flags.DEFINE_string("config", None, "File whose model gets random weights.", flag_values=FLAGS)
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Weights to use instead, as for decode.", flag_values=FLAGS)
BATCH_SIZES = flags.DEFINE_list(
    "batch_size", ["1"], "Rows decoded together; several numbers are measured one after the other.", flag_values=FLAGS
)
SIZES = [field for field in dataclasses.fields(DecodeProblem) if field.name != "batch_size"]
for field in SIZES:
    flags.DEFINE_integer(
        field.name,
        field.default,
        {
            "block_length": "Positions of a block.",
            "context": "Positions of the prompt: whole blocks.",
            "blocks": "Blocks whose forwards are timed.",
            "steps_per_block": "Forwards of every block.",
            "repeats": "How often everything is timed.",
        }[field.name],
        flag_values=FLAGS,
    )
DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["float32", "bfloat16"], "Of weights and computation.", flag_values=FLAGS
)
WEIGHTS = flags.DEFINE_enum("weights", None, WEIGHTS_KINDS, WEIGHTS_HELP, flag_values=FLAGS)
ROUTING = flags.DEFINE_enum(
    "routing", "uniform", ["uniform", "model"], "Which experts rows go to: any, or those the router says.",
    flag_values=FLAGS,
)  # fmt: skip
MESH = flags.DEFINE_string("mesh", "tensor:1", MESH_HELP, flag_values=FLAGS)
TPF = flags.DEFINE_float(
    "tpf", 6.2, "Tokens per forward that tokens per second are told for; default: the paper's mean.",
    lower_bound=0.0, flag_values=FLAGS,
)  # fmt: skip
SEED = flags.DEFINE_integer("seed", 0, "Of weights and routing.", lower_bound=0, flag_values=FLAGS)
BANDWIDTH_BYTES = flags.DEFINE_integer(
    "bandwidth_bytes", None, "Bytes that every device reads to measure the bandwidth; default: 4 GiB on a GPU, 256 MiB "
    "on a CPU.", lower_bound=4, flag_values=FLAGS,
)  # fmt: skip
PROFILE = flags.DEFINE_string(
    "profile", None, "Directory for a trace of one more run, of the last batch size.", flag_values=FLAGS
)
OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.", flag_values=FLAGS)
PLOT = flags.DEFINE_string(
    "plot",
    None,
    "PNG file to write: a forward's time and tokens per second against the batch size.",
    flag_values=FLAGS,
)


def main() -> None:
    problems = requested_problems()
    if bool(CONFIG.value) == bool(CHECKPOINT.value):
        raise InputError("give either --config (random weights) or --checkpoint")
    output = prepare_output(OUTPUT.value) if OUTPUT.value else None
    if PLOT.value is not None:
        require_matplotlib()
        plot = prepare_output(PLOT.value, "--plot")
    mesh = make_mesh(parse_mesh(MESH.value))
    use_compilation_cache()
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    # Before the weights are there, so that its array doesn't add to the peak of the memory.
    bandwidth = read_bandwidth(mesh, BANDWIDTH_BYTES.value or (2**28 if on_cpu else 2**32))
    start = time.perf_counter()
    config, params = load_model(mesh)
    jax.block_until_ready(params)
    loaded = {
        "parameters": count_params(config),
        "weights_seconds": time.perf_counter() - start,
        "bandwidth": bandwidth,
    }
    records = []
    for problem in problems:
        routed = params
        if ROUTING.value == "uniform":
            rows = problem.batch_size * max(problem.context, 2 * problem.block_length)
            routed = route_uniformly(params, rows, jax.random.key(SEED.value + 1))
        trace_directory = PROFILE.value if problem is problems[-1] else None
        records.append(measure(routed, params, config, problem, mesh, loaded, trace_directory))
        if output:  # after each, so that what is measured is not lost
            write_json(output, records[0] if len(problems) == 1 else records, indent=1)
        if len(problems) == 1:
            print(table(records[0]))
        else:
            print(f"{'' if len(records) > 1 else HEADING}{line(records[-1])}", flush=True)
    if PLOT.value is not None:
        plot_batches(records, plot)


def requested_problems() -> list[DecodeProblem]:
    """One per batch size; raises InputError for what is no whole number, or too small."""
    sizes = {field.name: FLAGS[field.name].value for field in SIZES}
    try:
        return [DecodeProblem(batch_size=int(text), **sizes) for text in BATCH_SIZES.value or [""]]
    except InputError:
        raise
    except ValueError:
        raise InputError(f"--batch_size={','.join(BATCH_SIZES.value)}: write numbers, such as 1,2,4") from None


def measure(
    routed: Params,
    params: Params,
    config: ModelConfig,
    problem: DecodeProblem,
    mesh: Mesh,
    loaded: dict[str, Any],
    trace_directory: str | None,
) -> dict[str, Any]:
    """What --output holds of one problem; `routed` are the weights with the routing that is asked for."""
    times = time_decoding(routed, config, problem, trace_directory=trace_directory)
    needed = required_bytes(params, config, problem, times.active_experts)
    limit_ms = 1e3 * needed.total / loaded["bandwidth"]
    return {
        **{flag.name: flag.value for flag in (CONFIG, CHECKPOINT, DTYPE, ROUTING, MESH, SEED)},
        "weights": weights_kind(params) or DTYPE.value,
        **dataclasses.asdict(problem),
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.devices.size,
        "jax": jax.__version__,
        "hopper_kernels": has_hopper(),
        **loaded,
        "mean_context": problem.mean_context,
        **dataclasses.asdict(times),
        "required_bytes": dataclasses.asdict(needed) | {"total": needed.total},
        "limit_ms": limit_ms,
        "fraction_of_limit": limit_ms / times.ms_per_forward,
        "tpf": TPF.value,
        "tps": 1e3 * TPF.value * problem.batch_size / times.ms_per_forward,
    }


def load_model(mesh: Mesh) -> tuple[ModelConfig, Params]:
    """The model of the flags on the mesh."""
    if CHECKPOINT.value:
        return load_checkpoint(checkpoint_directory(CHECKPOINT.value), DTYPE.value, mesh, weights=WEIGHTS.value)
    config = load_config(CONFIG.value).model
    if config is None:
        raise InputError(f"--config={CONFIG.value}: the run starts from a checkpoint; give that with --checkpoint")
    kind = WEIGHTS.value if WEIGHTS.value in KINDS else None
    return config, random_params(jax.random.key(SEED.value), config, DTYPE.value, mesh, kind=kind)


HEADING = (
    "rows   ms/forward   limit ms   reached   active experts   tokens/s   of each row   prefill ms   peak GB so far\n"
)


def line(record: dict[str, Any]) -> str:
    """The record as one line under HEADING; the peak of the memory is that of all lines so far."""
    active, peak = record["active_experts"], record["peak_bytes"]
    return (
        f"{record['batch_size']:4}   {record['ms_per_forward']:10.3f}   {record['limit_ms']:8.3f}   "
        f"{100 * record['fraction_of_limit']:5.1f} %   {sum(active) / len(active) if active else 0:14.1f}   "
        f"{record['tps']:8.0f}   {record['tps'] / record['batch_size']:11.0f}   {record['prefill_ms']:10.2f}   "
        f"{'-' if peak is None else f'{peak / 1e9:.2f}':>7}"
    )


def table(record: dict[str, Any]) -> str:
    """The record for a reader, one figure a line."""
    active, required = record["active_experts"], record["required_bytes"]
    kind = f" with {record['weights']} weights" if record["weights"] in KINDS else ""
    rows = {
        "model": f"{record['parameters']:,} parameters, {record['dtype']}{kind}, {record['routing']} routing",
        "devices": f"{record['devices']} x {record['device']}, jax {record['jax']}, "
        f"{'Hopper kernels' if record['hopper_kernels'] else 'plain functions'}",
        "problem": f"{record['batch_size']} x {record['block_length']} positions per forward after "
        f"{record['mean_context']:.0f} positions, {record['steps_per_block']} forwards per block",
        "forward": f"{record['ms_per_forward']:.3f} ms (median of {record['repeats']}, slowest "
        f"{record['slowest_ms_per_forward']:.3f})",
        "limit": f"{record['limit_ms']:.3f} ms: {required['total'] / 1e9:.3f} GB at {record['bandwidth'] / 1e12:.3f} "
        f"TB/s; reached {100 * record['fraction_of_limit']:.1f} %",
        "reads": ", ".join(f"{name} {required[name] / 1e9:.3f}" for name in required if name != "total") + " GB",
        "active experts": f"{sum(active) / len(active):.1f} per sparse layer ({min(active):.1f} to {max(active):.1f})"
        if active
        else "none: no layer is sparse",
        "repeats": f"{'the same tokens in all' if record['same_tokens'] else 'NOT the same tokens in all'}"
        + ("" if record["bytes_left_over"] is None else f", {record['bytes_left_over']:,} bytes left over"),
        "tokens/s": f"{record['tps']:.0f} at {record['tpf']:g} tokens per forward and row, prefill excluded",
        "prefill": f"{record['prefill_ms']:.2f} ms for {record['batch_size']} x {record['context']} positions",
        "start": f"weights {record['weights_seconds']:.1f} s, compilation {record['compile_seconds']:.1f} s",
        "peak memory": "not told by this backend"
        if record["peak_bytes"] is None
        else f"{record['peak_bytes'] / 1e9:.2f} GB of one device, since the start",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


if __name__ == "__main__":
    command.run(main, FLAGS, __doc__, verbs=("decode",))
