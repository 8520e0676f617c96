# SPDX-License-Identifier: Apache-2.0
"""`sglang-tokenselect doctor`: examines one section after the other, and prints what was found."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from functools import partial

from sglang_tokenselect.doctor import gpus, hooks, memory, modules, plugins, refused, versions
from sglang_tokenselect.doctor.planned import PlannedServer
from sglang_tokenselect.doctor.report import Section, fill, starts, to_json, to_lines


def run_doctor(args: argparse.Namespace) -> int:
    """Returns 0 if a server would start, as far as seen; 1 if not."""
    # What the libraries print while they are imported is not the report.
    with contextlib.redirect_stdout(sys.stderr):
        sections = examine(args.model_path, args.server_flags)
    print(json.dumps(to_json(sections), indent=2) if args.json else "\n".join(to_lines(sections)))
    return 0 if starts([*sections.values()]) else 1


def examine(model_path: str | None, server_flags: Sequence[str]) -> dict[str, Section]:
    parts = {"versions": versions, "gpus": gpus, "plugins": plugins, "hooks": hooks}
    sections = {name: fill(part.examine) for name, part in parts.items()}
    if model_path is None and not server_flags:
        sections["server"] = Section({"flags": "none given; with --model-path MODEL -- FLAGS a server is planned"})
        return sections
    return {**sections, **_examine_server(model_path, server_flags)}


def _examine_server(model_path: str | None, server_flags: Sequence[str]) -> dict[str, Section]:
    try:
        planned = PlannedServer.read(model_path, server_flags)
    # SystemExit: SGLang ends the process over some flags.
    except (Exception, SystemExit) as error:
        return {"server": Section(problems=[f"{type(error).__name__}: {error}"])}
    parts = {"server": refused, "memory": memory, "flashinfer": modules}
    return {name: fill(partial(part.examine, planned)) for name, part in parts.items()}
