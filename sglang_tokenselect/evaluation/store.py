# SPDX-License-Identifier: Apache-2.0
"""The folder of an evaluation: `run.json`, and `samples.jsonl` with a line for each answer as it comes."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from sglang_tokenselect.evaluation.settings import Key, Run


@dataclass(frozen=True)
class Record:
    """A line of `samples.jsonl`. A question that failed has an `error`, no score, and is asked again by the next run.

    Attributes:
        depth: where on the grid the asked-for fact stands; None in tasks that ask for several.
        prediction: what the server wrote.
        score: 0 to 1.
        finish_reason, prompt_tokens, cached_tokens, completion_tokens: as the server tells; None if it does not.
        seconds: from the request to the whole answer.
    """

    target: str
    task: str
    length: int
    seed: int
    index: int
    depth: float | None
    answers: tuple[str, ...]
    prediction: str | None = None
    score: float | None = None
    error: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    seconds: float | None = None

    @property
    def key(self) -> Key:
        return Key(self.target, self.task, self.length, self.seed, self.index)


class Store:
    """Opened for writing. `records` has the last line of each key."""

    def __init__(self, file: TextIO, records: dict[Key, Record]) -> None:
        self._file = file
        self.records = records

    def add(self, record: Record) -> None:
        self._file.write(json.dumps(asdict(record)) + "\n")
        self._file.flush()
        self.records[record.key] = record

    def is_answered(self, key: Key) -> bool:
        return key in self.records and self.records[key].error is None


@contextmanager
def open_store(folder: Path, run: Run) -> Iterator[tuple[Run, Store]]:
    """Begins a run in this folder or goes on with the one there, whose settings this one may extend.

    Raises:
        SystemExit: another run's numbers are there, or another process writes there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = samples_path(folder).open("a+", encoding="utf-8")
    except OSError as error:
        raise SystemExit(f"--out: expected a folder to write to or a place for one, got {error}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"--out: expected a folder that no other run writes to, got {folder}") from None
        _drop_half_line(samples_path(folder))
        run = joined(folder, run)
        write_json(run_path(folder), run.to_dict())
        yield run, Store(file, read_records(folder))


def joined(folder: Path, run: Run) -> Run:
    """What the folder holds and this run adds to it. Writes nothing.

    Raises:
        SystemExit: the two do not belong together.
    """
    if run_path(folder).exists():
        try:
            return read_run(folder).extended(run)
        except ValueError as error:
            raise SystemExit(f"{error}. Give the same option, or another folder than {folder}.") from None
    if samples_path(folder).exists() and samples_path(folder).stat().st_size:
        raise SystemExit(f"--out: expected run.json beside samples.jsonl, got {folder} without it")
    return run


def read_run(folder: Path) -> Run:
    path = run_path(folder)
    try:
        return Run.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise SystemExit(f"--out: expected a folder with run.json, got {folder}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"{path}: expected what an evaluation wrote, got {error!r}") from None


def read_records(folder: Path) -> dict[Key, Record]:
    """The last line of each key. A last line without its end is no record yet."""
    records: dict[Key, Record] = {}
    if not samples_path(folder).exists():
        return records
    with samples_path(folder).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.endswith("\n"):
                record = _parse(line, f"{file.name}, line {number}")
                records[record.key] = record
    return records


def write_json(path: Path, values: Any) -> None:
    """Whole or not at all."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)


def run_path(folder: Path) -> Path:
    return folder / "run.json"


def samples_path(folder: Path) -> Path:
    return folder / "samples.jsonl"


def _drop_half_line(path: Path) -> None:
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def _parse(line: str, where: str) -> Record:
    try:
        values = json.loads(line)
        return Record(**{**values, "answers": tuple(values["answers"])})
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{where}: expected an answer, got {error!r}") from None
