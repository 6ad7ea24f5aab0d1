"""A JSONL file in several: `answers-00000-of-00004.jsonl` and its siblings, and the patterns that name them all."""

import collections
import dataclasses
import glob
import pathlib
import re

from dmax_jax.errors import InputError

SHARD_NAME = re.compile(r"(?P<before>.*-)(?P<index>\d{5})-of-(?P<count>\d{5})(?P<after>\.\w+)")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One of `count` contiguous parts of something; the only one is the whole."""

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise InputError(f"shard {self.index}/{self.count}: the index must be from 0 to the count less 1")

    def path(self, whole: pathlib.Path) -> pathlib.Path:
        """The file of this shard: unless it is the whole, `-00000-of-00004` stands before the suffix."""
        if self.count == 1:
            return whole
        return whole.with_name(f"{whole.stem}-{self.index:05d}-of-{self.count:05d}{whole.suffix}")

    def part(self, length: int, batch_size: int) -> range:
        """Which of `length` items are this shard's: whole batches, as they would be cut without shards."""
        batches = -(-length // batch_size)
        first, end = (batches * index // self.count * batch_size for index in (self.index, self.index + 1))
        return range(first, min(end, length))


WHOLE = Shard()


def matching_files(pattern: str | pathlib.Path) -> list[pathlib.Path]:
    """The files that a glob pattern matches, in sorted order; a name without *, ? and [ is returned as it is.

    Raises InputError if nothing matches, or if shards are missing or stand beside those of another division.
    """
    if pathlib.Path(pattern).is_file() or not set("*?[") & set(str(pattern)):
        return [pathlib.Path(pattern)]
    files = [pathlib.Path(name) for name in sorted(glob.glob(str(pattern), recursive=True))]
    files = [file for file in files if file.is_file()]
    if not files:
        raise InputError(f"{pattern}: no file matches; correct the pattern or make the files first")
    _refuse_incomplete(str(pattern), files)
    return files


def _refuse_incomplete(pattern: str, files: list[pathlib.Path]) -> None:
    indices = collections.defaultdict(set)  # of the shards that are there, by what is the same in their names
    for file in files:
        if name := SHARD_NAME.fullmatch(str(file)):
            indices[name["before"], name["after"], int(name["count"])].add(int(name["index"]))
    divisions = {}
    for (before, after, count), present in indices.items():
        for index in range(count):
            if index not in present:
                missing = f"{before}{index:05d}-of-{count:05d}{after}"
                raise InputError(f"{pattern}: {missing} is missing; wait for its shard, or make the pattern match it")
        other = divisions.setdefault((before, after), count)
        if other != count:
            raise InputError(
                f"{pattern}: matches {before}*{after} in {other} shards and in {count}; remove one of them"
            )
