"""Measures a checkpoint on a task: accuracy with its 95 % interval, tokens per forward (TPF), tokens per second (TPS).

  python -m dmax_jax.evaluate --checkpoint=DIR --task=stories --samples=1000 --output=FILE.json
  python -m dmax_jax.evaluate --checkpoint=DIR --task=gsm8k_test.jsonl --method=threshold --thresholds=0.95,0.7,0.5
  python -m dmax_jax.evaluate --study=configs/study_small.py --workdir=DIR

An answer is right if the integer after its last `####` is the reference's. The prefill counts as one forward in TPF and
in the time of TPS. Several thresholds share one start, give a line each, and the area under parallelism (AUP). The JSON
has settings, versions, device and "results": per threshold its figures and, under "samples", every answer.

A study trains and measures many models as a file with get_study() says. It does what the working directory lacks, and
writes DIR/report: study.json, points.csv, tables.md and plots. The same command may be started several times at once,
with a GPU each: every process takes what no other has taken. Killed and started again, it goes on.
"""

import pathlib
import sys

from absl import flags

from dmax_jax import command
from dmax_jax.compilation_cache import use_compilation_cache
from dmax_jax.decoding.policies import Policy
from dmax_jax.decoding_flags import DecodingFlags
from dmax_jax.errors import InputError
from dmax_jax.evaluation.metrics import area_under_parallelism
from dmax_jax.evaluation.report import table, to_json
from dmax_jax.evaluation.run import evaluate
from dmax_jax.evaluation.tasks import load_problems
from dmax_jax.output_file import prepare_output, write_json
from dmax_jax.study.plan import load_study
from dmax_jax.study.plots import require_matplotlib
from dmax_jax.study.report import write_report
from dmax_jax.study.runner import read_points, run_study, wait_for_lock

FLAGS = flags.FlagValues()
DECODING = DecodingFlags(FLAGS, batch_size=64, gen_length=128)
TASK = flags.DEFINE_string(
    "task", None, "Name of a generated task (stories: its test split), or a .jsonl file with question and answer.",
    flag_values=FLAGS,
)  # fmt: skip
SAMPLES = flags.DEFINE_integer(
    "samples", None, "How many problems; default: 1000 of a generated task, all of a file.", flag_values=FLAGS
)
TEST_SEED = flags.DEFINE_integer("test_seed", 0, "Seed of a generated task's problems.", flag_values=FLAGS)
THRESHOLDS = flags.DEFINE_list("thresholds", None, "Several, instead of --threshold: 0.95,0.5,0.", flag_values=FLAGS)
BEST_ACCURACY = flags.DEFINE_float(
    "best_accuracy", 0.0, "For AUP: the best accuracy in percent of all methods compared; default: this sweep's.",
    lower_bound=0.0, upper_bound=100.0, flag_values=FLAGS,
)  # fmt: skip
OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.", flag_values=FLAGS)
STUDY = flags.DEFINE_string(
    "study", None, "Python file with get_study() -> Study; all other flags but the next two are not for it.",
    flag_values=FLAGS,
)  # fmt: skip
WORKDIR = flags.DEFINE_string("workdir", None, "With --study: directory of its models and figures.", flag_values=FLAGS)
ROWS = flags.DEFINE_list("rows", None, "With --study: names of the only rows to run.", flag_values=FLAGS)


def main() -> None:
    if STUDY.value:
        study_main()
        return
    if not TASK.value:
        raise InputError("give --task, or --study with --workdir")
    if WORKDIR.value or ROWS.value:
        raise InputError("--workdir and --rows belong to --study")
    policies, settings = requested_policies(), DECODING.settings()
    problems = load_problems(TASK.value, SAMPLES.value, TEST_SEED.value)
    output = prepare_output(OUTPUT.value) if OUTPUT.value else None
    use_compilation_cache()
    model = DECODING.load()
    if model.tokenizer is None:
        raise InputError(f"{model.directory}: tokenizer.json is missing; questions are text")
    results, aup = [], None
    for policy in policies:
        results.append(evaluate(model.params, model.config, model.tokenizer, problems, policy, settings)[0])
        points = [(result.metrics.tpf_macro, result.metrics.accuracy) for result in results]
        aup = area_under_parallelism(points, BEST_ACCURACY.value) if len(points) > 1 else None
        if output:  # after each threshold, so that an interrupted sweep leaves what it has
            write_json(output, to_json(described_settings(), results, aup), indent=1)
    print(table(results) + ("" if aup is None else f"\nAUP {aup:.1f}"))


def study_main() -> None:
    """Runs a study's missing parts and writes the report of all that is there."""
    if not WORKDIR.value:
        raise InputError("--study needs --workdir")
    for name in FLAGS:
        if FLAGS[name].present and name not in ("study", "workdir", "rows"):
            raise InputError(f"--{name} is not for a study, whose file says everything")
    require_matplotlib()
    study, workdir = load_study(STUDY.value), pathlib.Path(WORKDIR.value)
    use_compilation_cache()
    if not run_study(study, workdir, ROWS.value or ()):
        print("stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(130)
    with wait_for_lock(workdir / "locks" / "report"):  # processes that end together write it in turn
        files = write_report(study, read_points(study, workdir), workdir / "report")
    print("\n".join(map(str, files)))


def requested_policies() -> list[Policy]:
    """The policy of the flags, once for every threshold; raises InputError for a bad threshold."""
    policy = DECODING.policy()
    if THRESHOLDS.value is None:
        return [policy]
    if FLAGS.threshold is not None:
        raise InputError("give --threshold or --thresholds, not both")
    try:
        thresholds = [float(text) for text in THRESHOLDS.value]
    except ValueError:
        thresholds = []
    if not thresholds:
        raise InputError(f"--thresholds={','.join(THRESHOLDS.value)}: write numbers with commas between: 0.95,0.5,0")
    return [policy.replace(threshold=threshold) for threshold in thresholds]


def described_settings() -> dict:
    """What was asked for; each result carries its own policy."""
    settings = DECODING.describe()
    del settings["policy"], settings["device"]
    return {"task": TASK.value, "test_seed": TEST_SEED.value} | settings


if __name__ == "__main__":
    command.run(main, FLAGS, __doc__)
