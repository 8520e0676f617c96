# SPDX-License-Identifier: Apache-2.0
"""The report: sections of facts and problems, as text and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Section:
    """
    Attributes:
        facts: name to value, in order.
        problems: each keeps a server from starting, as far as the section can tell.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def fill(examine: Callable[[], Section]) -> Section:
    """What `examine` finds. An error in it is a problem of the section: the other sections are shown all the same."""
    try:
        return examine()
    # SystemExit: SGLang ends the process over some flags.
    except (Exception, SystemExit) as error:
        return Section(problems=[f"{type(error).__name__}: {error}"])


def starts(sections: Sequence[Section]) -> bool:
    return not any(section.problems for section in sections)


def to_json(sections: dict[str, Section]) -> dict[str, Any]:
    return {"starts": starts([*sections.values()]), **{name: asdict(section) for name, section in sections.items()}}


def to_lines(sections: dict[str, Section]) -> list[str]:
    lines = []
    for name, section in sections.items():
        width = max(map(len, section.facts), default=0)
        lines.append(f"[{name}]")
        for key, value in section.facts.items():
            first, *others = _shown(value)
            lines += [f"  {key:{width}}  {first}", *(f"  {'':{width}}  {other}" for other in others)]
        lines += [f"  ! {problem}" for problem in section.problems]
    if num_problems := sum(len(section.problems) for section in sections.values()):
        return [*lines, f"Problems, each marked with !: {num_problems}. A server would not start."]
    return [*lines, "No problems found."]


def _shown(value: Any) -> list[str]:
    """One or more lines."""
    if isinstance(value, list):
        return [str(item) for item in value] or ["none"]
    return ["none" if value is None else str(value)]
