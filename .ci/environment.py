# SPDX-License-Identifier: Apache-2.0
"""Creates an environment of this checkout. Started by `.ci/env`; needs only the standard library.

Two layers, since SGLang and what it needs take 9 GB:

- a third-party environment outside the checkout, named by what it holds and shared by all checkouts
  (`~/.cache/sglang-tokenselect/`, or the folder in `SGLANG_TOKENSELECT_CACHE`);
- a folder in the checkout, which sees the first through a .pth file and holds this package, editable:
  `.venv`, and beside it one for each other version of SGLang (the Makefile names them).
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
# What `make` needs beside the package and its tests. Checkers are pinned: releases differ in what they report.
TOOLS = ("mypy==2.4.1", "ruff==0.14.5", "typos==1.52.0")
EDITABLE_INSTALL = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet", "--editable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog=".ci/env")
    parser.add_argument("--sglang", required=True, metavar="VERSION", help="of SGLang (the Makefile has the default)")
    parser.add_argument("--venv", required=True, metavar="FOLDER", help="of the checkout, to be made ready")
    given = parser.parse_args()
    wanted = requirements((CHECKOUT / "pyproject.toml").read_text(), given.sglang)
    shared = shared_environment(wanted, given.sglang)
    with locked(Path(__file__)):  # any file of the checkout would do
        link_checkout(CHECKOUT / given.venv, shared)


def requirements(pyproject: str, sglang: str) -> list[str]:
    """Dependencies and test extra of the package, with SGLang pinned, and the tools; sorted."""
    project = tomllib.loads(pyproject)["project"]
    names = [*project["dependencies"], *project["optional-dependencies"]["test"], *TOOLS]
    return sorted(f"sglang=={sglang}" if re.match(r"sglang\b", name) else name for name in names)


def shared_environment(wanted: list[str], sglang: str) -> Path:
    """The third-party environment that holds `wanted`, built if there is none that is complete."""
    digest = hashlib.sha256("\n".join(wanted).encode()).hexdigest()[:8]
    folder = cache_folder() / f"py{sys.version_info.major}.{sys.version_info.minor}-sglang{sglang}-{digest}"
    complete = folder / ".complete"
    if complete.exists():
        return folder
    with locked(folder.with_suffix(folder.suffix + ".lock")):
        if not complete.exists():
            build(folder, wanted)
            complete.write_text("\n".join(wanted) + "\n")  # last: without it the folder is built anew
    return folder


def cache_folder() -> Path:
    folder = os.environ.get("SGLANG_TOKENSELECT_CACHE") or Path.home() / ".cache" / "sglang-tokenselect"
    return Path(folder).absolute()


def build(folder: Path, wanted: list[str]) -> None:
    say(f"Installing {', '.join(wanted)}\n  into {folder} (about 9 GB, once; a minute with uv, five with pip)")
    begin = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "venv", str(folder))
    python = str(folder / "bin" / "python")
    pip = (python, "-m", "pip", "install", "--disable-pip-version-check")
    # Compiled here, as pip does it: SGLang imports thousands of modules in each of its processes, and
    # where PYTHONDONTWRITEBYTECODE is set they would be compiled in every one.
    uv = (str(folder / "bin" / "uv"), "pip", "install", "--compile-bytecode", "--python", python)
    if not (succeeds(*pip, "--quiet", "uv") and succeeds(*uv, *wanted)):
        say("uv is not to be had or failed (it does not read pip's settings); going on with pip")
        run(*pip, *wanted)
    say(f"Installed in {time.monotonic() - begin:.0f} s")


def link_checkout(venv: Path, shared: Path) -> None:
    """Makes `venv` see `shared` and hold the package as pyproject.toml now has it."""
    python = str(venv / "bin" / "python")
    linked, installed = venv / ".linked", venv / ".installed"
    if read(linked) != f"{CHECKOUT}\n{shared}\n":
        say(f"Linking {venv.name} to {shared}")
        shutil.rmtree(venv, ignore_errors=True)
        run(sys.executable, "-m", "venv", "--without-pip", str(venv))
        packages = Path("lib", f"python{sys.version_info.major}.{sys.version_info.minor}", "site-packages")
        (venv / packages / "shared.pth").write_text(f"import site; site.addsitedir({str(shared / packages)!r})\n")
        link_commands(shared / "bin", venv / "bin")
        linked.write_text(f"{CHECKOUT}\n{shared}\n")
    pyproject = (CHECKOUT / "pyproject.toml").read_text()
    if read(installed) != pyproject:
        run(python, "-m", "pip", "install", *EDITABLE_INSTALL, str(CHECKOUT))
        installed.write_text(pyproject)


def link_commands(shared: Path, own: Path) -> None:
    """Gives the folder `own` of the checkout the commands of the shared environment (sglang, pytest, ...).

    Scripts are copied with this checkout's Python in their first line: that of the shared
    environment does not see the package. Programs are linked.
    """
    for command in shared.iterdir():
        mine = own / command.name
        if mine.exists() or not command.is_file() or not os.access(command, os.X_OK):
            continue
        content = command.read_bytes()
        if content.startswith(b"#!"):
            mine.write_bytes(content.replace(os.fsencode(shared), os.fsencode(own), 1))
            mine.chmod(0o755)
        else:
            mine.symlink_to(command)


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock; says so if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Waiting for another build of the environment ({path})")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(*command: str) -> None:
    """Runs a command with its output shown; ends this script if it fails."""
    if not succeeds(*command):
        sys.exit(f"command: expected exit code 0, got another from {' '.join(command)}")


def succeeds(*command: str) -> bool:
    return subprocess.run(command, stdin=subprocess.DEVNULL, cwd=CHECKOUT).returncode == 0


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
