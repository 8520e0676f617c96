# SPDX-License-Identifier: Apache-2.0
"""Whether SGLang finds our entry points and loads them: what its log says of plugins, in one place."""

from __future__ import annotations

import logging
import os
from importlib.metadata import entry_points
from typing import Any

from sglang_tokenselect import cpu_platform
from sglang_tokenselect.doctor.report import Section
from sglang_tokenselect.plugin import BACKEND

GROUPS = {"sglang.srt.plugins": "tokenselect", "sglang.srt.platforms": cpu_platform.NAME}
FILTERS = ("SGLANG_PLUGINS", "SGLANG_PLATFORM", "SGLANG_USE_CPU_ENGINE")


class _Errors(logging.Handler):
    """Keeps what SGLang says of a plugin that failed, which it logs and forgets."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        cause = f": {record.exc_info[1]}" if record.exc_info else ""
        self.messages.append(record.getMessage() + cause)


def examine() -> Section:
    section = Section(problems=_load())
    for group, name in GROUPS.items():
        found = entry_points(group=group)
        section.facts[group] = [f"{entry.name} ({entry.dist.name if entry.dist else None})" for entry in found]
        if name not in found.names:
            section.problems.append(f"{group}: expected the entry point {name}, got none: is the package installed?")
    section.facts.update({name: os.environ.get(name) for name in FILTERS})
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.platforms import current_platform

    section.facts["platform"] = _name(type(current_platform))
    section.facts["backend registered"] = "yes" if BACKEND in ATTENTION_BACKENDS else "no"
    if BACKEND not in ATTENTION_BACKENDS:
        section.problems.append(f"--attention-backend {BACKEND}: expected to be registered, got nothing of its name")
    return section


def _load() -> list[str]:
    """Loads the plugins as SGLang does; returns the errors."""
    from sglang.srt.plugins import load_plugins

    logger, errors = logging.getLogger("sglang.srt.plugins"), _Errors()
    logger.addHandler(errors)
    try:
        load_plugins()
    finally:
        logger.removeHandler(errors)
    return errors.messages


def _name(kind: type[Any]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
