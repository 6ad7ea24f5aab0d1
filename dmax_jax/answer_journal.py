"""What a run that answers questions has done so far, on disk, so that a killed run goes on and settings never mix.

Beside an output NAME stand two files. NAME.run.json has the settings that make it, and in the end its figures.
NAME.journal, until the output is there, has a line for every question answered.
"""

import dataclasses
import json
import pathlib
from typing import Any, TextIO

from dmax_jax.errors import InputError
from dmax_jax.output_file import whole_file, write_json


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What is known of a question that was answered."""

    answer: str | None  # None if it did not end
    tokens: int
    forwards: int  # over blocks; the prefill is not counted
    seconds: float  # of its whole batch


@dataclasses.dataclass(frozen=True)
class Journal:
    """The journal of the file `output`, which `settings` (values of JSON, by name) decide."""

    output: pathlib.Path
    settings: dict[str, Any]

    @property
    def file(self) -> pathlib.Path:
        return self.output.with_name(self.output.name + ".journal")

    @property
    def record(self) -> pathlib.Path:
        return self.output.with_name(self.output.name + ".run.json")

    def resume(self, questions: int, batch_size: int) -> list[Outcome]:
        """Returns what an earlier run has done, in whole batches, and leaves the file with that and no more.

        Raises InputError if that run had other settings.
        """
        outcomes = read_outcomes(self.file)
        if outcomes:
            self._read_record()
        else:
            self.write_record()
        if len(outcomes) < questions:
            outcomes = outcomes[: len(outcomes) // batch_size * batch_size]
        with whole_file(self.file) as file:
            for outcome in outcomes:
                write_outcome(file, outcome)
        return outcomes

    def close(self) -> dict[str, Any]:
        """Returns the figures of the output that is there; raises InputError if other settings made it."""
        figures = self._read_record()["figures"]
        if figures is None:
            raise InputError(f"{self.output}: the file is not of the run that {self.record.name} is of: {self._remedy}")
        self.file.unlink(missing_ok=True)
        return figures

    def write_record(self, figures: dict[str, Any] | None = None) -> None:
        write_json(self.record, {"settings": self.settings, "figures": figures}, indent=1)

    def _read_record(self) -> dict[str, Any]:
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            settings = record["settings"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            raise InputError(
                f"{self.output}: there are answers, but no {self.record.name} that says what made them: {self._remedy}"
            ) from None
        for name in [*self.settings, *(settings.keys() - self.settings.keys())]:
            if settings.get(name) != self.settings.get(name):
                raise InputError(
                    f"{self.output}: there are answers made with {name}={settings.get(name)}, this run has "
                    f"{self.settings.get(name)}: use the same settings, {self._remedy}"
                )
        return record

    @property
    def _remedy(self) -> str:
        return f"choose another --output, or remove {self.output}* to start over"


def write_outcome(file: TextIO, outcome: Outcome) -> None:
    file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")


def read_outcomes(file: pathlib.Path) -> list[Outcome]:
    """The outcomes up to the first line that is not whole, which is the last thing that a killed process wrote."""
    outcomes = []
    for line in file.read_bytes().split(b"\n")[:-1] if file.exists() else []:
        try:
            outcomes.append(Outcome(**json.loads(line)))
        except (ValueError, TypeError):
            break
    return outcomes
