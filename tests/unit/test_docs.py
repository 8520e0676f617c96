# SPDX-License-Identifier: Apache-2.0
"""What the documents and the folders promise."""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.flags import shown_default

REPO = Path(__file__).parents[2]


def options_table() -> str:
    """The README's table, from the configuration: paste what a failing test prints."""
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for option in fields(TokenSelectConfig):
        name = option.name.replace("_", "-")
        rows.append(f"| `--tokenselect-{name}` | {shown_default(option)} | {option.metadata['help']} |")
    return "\n".join(rows)


def test_the_readme_has_every_option():
    readme = (REPO / "README.md").read_text()
    found = re.search(r"<!-- options table -->\n(.*?)\n<!-- end of options table -->", readme, re.DOTALL)
    assert found.group(1) == options_table()


@pytest.mark.parametrize(
    "document",
    [
        *("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"),
        *(
            "docs/effort.md",
            "docs/accuracy.md",
            "docs/evaluation.md",
            "docs/inspect.md",
            "docs/doctor.md",
            "docs/faults.md",
        ),
        *("bench/needle/README.md", "bench/kernels/README.md"),
    ],
)
def test_links_and_paths_exist(document):
    text = (REPO / document).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert not [link for link in links if not (REPO / document).parent.joinpath(link).exists()]


def test_kernels_import_torch_and_triton_only():
    for file in (REPO / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module)
            allowed = {"torch", "triton", *sys.stdlib_module_names}
            assert all(name.partition(".")[0] in allowed for name in names), (file, names)


def test_every_source_file_names_its_license():
    for file in REPO.glob("**/*.py"):
        parts = file.relative_to(REPO).parts
        if not any(part.startswith(".") and part != ".ci" or part in ("build", "dist") for part in parts):
            assert "SPDX-License-Identifier: Apache-2.0" in file.read_text()[:200], file
