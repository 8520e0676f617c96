# SPDX-License-Identifier: Apache-2.0
"""The wheel holds everything, what stands behind symlinks and the checkpoint too, and works where it is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_{}(sys.argv[1]))"
NEEDED = (
    "sglang_tokenselect/kernels/reference/vote.py",
    "sglang_tokenselect/patches/install.py",
    "sglang_tokenselect/needle/checkpoint/model.safetensors",
    "sglang_tokenselect/py.typed",
    "sglang_tokenselect/trace/page.html",
    "sglang_tokenselect/trace/page.js",
)
OURS_ALONE = ("sglang_tokenselect/", "sglang_tokenselect-")
# Run where this package is installed and nothing else, in a folder without a checkout.
LOOK = """
import json, pathlib, sys
from importlib.metadata import distribution, entry_points
import sglang_tokenselect
from sglang_tokenselect.needle import checkpoint_path
own = distribution("sglang-tokenselect")
folder = pathlib.Path(sglang_tokenselect.__file__).parent
print(json.dumps({
    "version": [own.version, sglang_tokenselect.__version__],
    "is_in_environment": folder.is_relative_to(sys.prefix),
    "links": [path.name for path in folder.rglob("*") if path.is_symlink()],
    "entry_points": {entry.name: [entry.group, entry.value] for entry in own.entry_points},
    "platforms": [entry.name for entry in entry_points(group="sglang.srt.platforms")],
    "requires": own.requires,
    "checkpoint": sorted(path.name for path in checkpoint_path().iterdir()),
}))
"""


def build(kind: str, source: Path, out: Path) -> Path:
    out.mkdir()
    command = [sys.executable, "-c", BUILD.format(kind), str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True)
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What git tracks or would: a build leaves its folders behind, so it runs in a copy."""
    folder = tmp_path_factory.mktemp("source")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
    for name in filter(lambda name: (REPO / name).exists(), listed.splitlines()):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPO / name, target, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build("wheel", source, tmp_path_factory.mktemp("wheel") / "out")


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory):
    """The commands of an environment that has the wheel and nothing else, not what it depends on either."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    return folder / "bin"


def run_clean(command: list[str], folder: Path) -> str:
    """In an empty environment: a PYTHONPATH would bring back what is missing there."""
    return subprocess.run(command, cwd=folder, env={}, capture_output=True, text=True, check=True).stdout


def test_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert set(NEEDED) <= set(names)
    assert not [name for name in names if not name.startswith(OURS_ALONE)]


def test_source_archive_builds_the_same_wheel(source, wheel, tmp_path):
    archive = build("sdist", source, tmp_path / "out")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    with zipfile.ZipFile(build("wheel", unpacked, tmp_path / "wheel")) as again, zipfile.ZipFile(wheel) as first:
        assert {info.filename: info.CRC for info in again.infolist()} == {
            info.filename: info.CRC for info in first.infolist()
        }


def test_installed_it_is_whole_and_registered(clean, tmp_path):
    found = json.loads(run_clean([str(clean / "python"), "-c", LOOK], tmp_path))
    assert found["version"][0] == found["version"][1]
    assert found["is_in_environment"]
    assert found["links"] == []
    declared = {"console_scripts": PROJECT["scripts"], **PROJECT["entry-points"]}
    assert found["entry_points"] == {
        name: [group, value] for group, entries in declared.items() for name, value in entries.items()
    }
    assert found["platforms"] == ["tokenselect_cpu"]
    assert {requirement.partition("<")[0] for requirement in found["requires"] if "extra" not in requirement} == {
        requirement.partition(">")[0] for requirement in PROJECT["dependencies"]
    }
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found["checkpoint"])


def test_the_command_starts_without_what_it_needs_later(clean, tmp_path):
    told = run_clean([str(clean / "sglang-tokenselect"), "--help"], tmp_path)
    assert all(command in told for command in ("demo", "monitor", "ctl", "eval", "fidelity", "trace"))
