# SPDX-License-Identifier: Apache-2.0
"""Gives a server another plugin of SGLang, from one file with a function `register`, and installs nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def plugin_env(folder: Path, file: str | Path) -> dict[str, str]:
    """Environment of a server that loads `file` as a plugin. `folder` gets a copy of it, and what names it."""
    name = Path(file).stem
    about = folder / f"{name}-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 0\n")
    (about / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {name}:register\n")
    shutil.copy(file, folder)
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}
