# SPDX-License-Identifier: Apache-2.0
"""What this package depends on: declared, used, within its pins, and not withdrawn from the index.

Known vulnerabilities are not looked up: CONTRIBUTING.md says why.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import tomllib
import urllib.error
import urllib.request
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
DEPENDENCIES = [Requirement(text) for text in PROJECT["dependencies"]]
TEST_EXTRA = [Requirement(text) for text in PROJECT["optional-dependencies"]["test"]]
# SGLang pins them to what it works with, so this package takes what SGLang brings.
BROUGHT_BY_SGLANG = {"flashinfer-python", "orjson"}
INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")


def imported_modules(folder: str) -> set[str]:
    """Top-level names of all absolute imports, those inside functions included."""
    found: set[str] = set()
    for file in (REPO / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module)
    return {name.partition(".")[0] for name in found}


@cache
def distributions() -> dict[str, set[str]]:
    """Distributions by the names that they are imported by."""
    return {module: {canonicalize_name(name) for name in names} for module, names in packages_distributions().items()}


def third_party(*folders: str) -> set[str]:
    """Distributions that the code imports; a namespace such as `google` counts as all that share it."""
    modules = set().union(*map(imported_modules, folders)) - sys.stdlib_module_names - {"sglang_tokenselect"}
    return set().union(*(distributions().get(module, {module}) for module in modules))


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    # rglob follows no symlinks to folders, so these two stand beside the package.
    used = third_party("sglang_tokenselect", "kernels", "patches")
    assert used - BROUGHT_BY_SGLANG == names(DEPENDENCIES)


def test_what_tests_import_is_declared():
    support = {file.stem for file in (REPO / "tests" / "support").glob("*.py")}
    used = third_party("tests") - {"bench", "examples"} - support
    assert used - BROUGHT_BY_SGLANG <= names([*DEPENDENCIES, *TEST_EXTRA])


@pytest.mark.parametrize("requirement", [*DEPENDENCIES, *TEST_EXTRA], ids=str)
def test_the_installed_version_is_within_its_pin(requirement):
    assert requirement.specifier.contains(version(requirement.name), prereleases=True)


def release_files(name: str) -> list[dict[str, Any]]:
    """The files of a project as the index lists them (PEP 691); skips where it cannot be reached."""
    headers = {"Accept": "application/vnd.pypi.simple.v1+json"}
    request = urllib.request.Request(f"{INDEX}/{canonicalize_name(name)}/", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return json.load(response)["files"]
    except (urllib.error.URLError, TimeoutError, json.JSONDecodeError) as error:
        pytest.skip(f"{INDEX} does not answer as PEP 691 has it: {error}")


def is_of(filename: str, installed: str) -> bool:
    """Whether a wheel or source archive is of this version."""
    return f"-{installed}-" in filename or filename.endswith(f"-{installed}.tar.gz")


@pytest.mark.parametrize("name", sorted(names([*DEPENDENCIES, *TEST_EXTRA])))
def test_the_installed_version_is_not_yanked(name):
    installed = version(name).partition("+")[0]
    files = [file for file in release_files(name) if is_of(file["filename"], installed)]
    assert files, f"{name}: expected {installed} on {INDEX}, got no file of it"
    assert not all(file.get("yanked") for file in files), f"{name} {installed}: {files[0]['yanked']}"
