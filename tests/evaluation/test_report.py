import platform

import jax

from dmax_jax.evaluation.metrics import Metrics
from dmax_jax.evaluation.report import Result, environment, table

METRICS = Metrics(
    problems=1000,
    accuracy=92.1,
    accuracy_low=90.26,
    accuracy_high=93.61,
    tpf_macro=5.481,
    tpf_total=5.1,
    forwards=20.25,
    tps=1258.04,
    finished=0.995,
    tokens=100,
    seconds=1.0,
)


def test_table():
    assert table([Result({"threshold": 0.5}, METRICS, []), Result({"threshold": 0.0}, METRICS, [])]).splitlines() == [
        "threshold    accuracy % (95 %)  TPF macro  TPF total  forwards     TPS  finished %",
        "      0.5  92.1 (90.3 to 93.6)       5.48       5.10      20.2  1258.0        99.5",
        "        0  92.1 (90.3 to 93.6)       5.48       5.10      20.2  1258.0        99.5",
    ]


def test_environment():
    assert environment()["python"] == platform.python_version()
    assert environment()["jax"] == jax.__version__
    assert environment()["device"] == jax.devices()[0].device_kind
    assert set(environment()) == {"dmax_jax", "jax", "jaxlib", "python", "device"}
