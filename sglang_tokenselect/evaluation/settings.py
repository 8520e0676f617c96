# SPDX-License-Identifier: Apache-2.0
"""What an evaluation asks, and of whom: all that its numbers depend on. `run.json` holds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

Api = Literal["completions", "chat"]

# A later run in the same folder may add to these, and may ask for more samples; all else must be the same.
EXTENSIBLE = ("tasks", "lengths", "seeds")


class Key(NamedTuple):
    """Names one sample of one target."""

    target: str
    task: str
    length: int
    seed: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls


@dataclass(frozen=True)
class Settings:
    """What every target is asked.

    Attributes:
        version: of this package, which draws the samples.
        lengths: tokens of prompt, answer's beginning and answer together.
        samples: of each task, length and seed.
        depths: steps of the grid from 0 (start) to 1 (end) that the asked-for fact stands at; 0: no grid.
        tokenizer: folder or name.
    """

    version: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    seeds: tuple[int, ...]
    samples: int
    depths: int
    api: Api
    tokenizer: str

    def keys(self, target: str) -> Iterator[Key]:
        """All samples of a target, by length, seed and index."""
        for length in sorted(self.lengths):
            for seed in self.seeds:
                for index in range(self.samples):
                    for task in self.tasks:
                        yield Key(target, task, length, seed, index)

    def depth(self, index: int) -> float | None:
        """Where the sample of this index has its fact; None: anywhere. A grid of one step is the middle."""
        if not self.depths:
            return None
        return 0.5 if self.depths == 1 else (index % self.depths) / (self.depths - 1)


@dataclass(frozen=True)
class Target:
    """A server as it is asked.

    Attributes:
        url: without /v1. It may change between two runs in one folder.
        extra_body: sent with every request.
        server: what an SGLang server tells about itself: version, attention backend, TokenSelect's configuration.
    """

    name: str
    url: str
    model: str
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    server: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """The content of `run.json`: settings, targets by name, and versions of libraries when it began."""

    settings: Settings
    targets: Mapping[str, Target]
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Run:
        listed = values["settings"].items()
        settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in listed}
        targets = {name: Target(**target) for name, target in values["targets"].items()}
        return cls(Settings(**settings), targets, values["versions"])

    def extended(self, other: Run) -> Run:
        """This run and what `other` adds to it: tasks, lengths, seeds, samples, targets.

        Raises:
            ValueError: the numbers of the two would not belong together.
        """
        return Run(
            _extended_settings(self.settings, other.settings),
            {**self.targets, **{name: _same_target(self.targets, target) for name, target in other.targets.items()}},
            self.versions,
        )


def _extended_settings(old: Settings, new: Settings) -> Settings:
    changed: dict[str, Any] = {}
    for name in (option.name for option in fields(Settings)):
        before, after = getattr(old, name), getattr(new, name)
        if name in EXTENSIBLE:
            changed[name] = tuple(dict.fromkeys((*before, *after)))
        elif name == "samples":
            if after < before:
                raise ValueError(f"samples: expected at least {before}, as before, got {after}")
            changed[name] = after
        elif before != after:
            raise ValueError(f"{name}: expected {before!r}, as before, got {after!r}")
    return replace(old, **changed)


def _same_target(known: Mapping[str, Target], new: Target) -> Target:
    """The target with its new URL, if it is otherwise the one known by this name."""
    old = known.get(new.name, new)
    for name in ("model", "extra_body", "server"):
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            raise ValueError(f"{name} of {new.name}: expected {before!r}, as before, got {after!r}")
    return new
