"""Where a run's figures go: one JSON object per line, and TensorBoard."""

import json
import pathlib

import tensorboardX


class MetricWriter:
    """Appends to `metrics.jsonl` and to TensorBoard events; when a run resumes at `step`, later rows are dropped."""

    def __init__(self, workdir: pathlib.Path, step: int):
        path = workdir / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= step]
        path.write_text("".join(kept))
        self._file = path.open("a")
        self._events = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._events.close()


def _lines(path: pathlib.Path) -> list[str]:
    """The complete lines of a file, which a crash may have cut short."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
