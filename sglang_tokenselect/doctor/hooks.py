# SPDX-License-Identifier: Apache-2.0
"""Each hook of this machine: whether SGLang is what it was written for, and whether it is applied."""

from __future__ import annotations

from sglang_tokenselect.doctor.report import Section


def examine() -> Section:
    from sglang_tokenselect.patches import install

    section = Section()
    for hook in install.hooks():
        faults = hook.find_faults()
        state = "does not fit" if faults else "fits"
        applied = hook.is_applied()
        section.facts[hook.target.removeprefix("sglang.srt.")] = f"{state}, {'applied' if applied else 'not applied'}"
        section.problems += faults
        if not applied:
            section.problems.append(f"{hook.file}: {hook.target}: expected to be applied, got no wrapper of ours")
    return section
