# SPDX-License-Identifier: Apache-2.0
"""The wheel and the source archive hold everything: what stands behind symlinks, and the checkpoint."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_{}(sys.argv[1]))"
NEEDED = (
    "sglang_tokenselect/kernels/reference/vote.py",
    "sglang_tokenselect/patches/install.py",
    "sglang_tokenselect/needle/checkpoint/model.safetensors",
    "sglang_tokenselect/py.typed",
    "sglang_tokenselect/trace/page.html",
    "sglang_tokenselect/trace/page.js",
)


def build(kind: str, source: Path, out: Path) -> Path:
    out.mkdir()
    command = [sys.executable, "-c", BUILD.format(kind), str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True)
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What git tracks: a build leaves its folders behind, so it runs in a copy."""
    folder = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPO / name, target, follow_symlinks=False)
    return folder


def test_wheel(source, tmp_path):
    wheel = build("wheel", source, tmp_path / "out")
    with zipfile.ZipFile(wheel) as archive:
        assert set(NEEDED) <= set(archive.namelist())
        assert not [
            name
            for name in archive.namelist()
            if name.startswith(("kernels/", "patches/", "tests/", "bench/", "examples/"))
        ]
        archive.extractall(tmp_path / "site")
    code = "import sglang_tokenselect.kernels.reference.decode, sglang_tokenselect as s; print(s.__file__)"
    env, command = {"PYTHONPATH": str(tmp_path / "site")}, [sys.executable, "-c", code]
    found = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(tmp_path / "site"))


def test_source_archive_builds_the_same_wheel(source, tmp_path):
    archive = build("sdist", source, tmp_path / "out")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    with zipfile.ZipFile(build("wheel", unpacked, tmp_path / "wheel")) as wheel:
        assert set(NEEDED) <= set(wheel.namelist())
