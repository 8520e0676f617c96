# SPDX-License-Identifier: Apache-2.0
"""The SGLang versions that the hooks were checked against. The only place that compares versions."""

from __future__ import annotations

from importlib.metadata import version

FIRST_SGLANG = (0, 5, 17)
END_OF_SGLANG = (0, 5, 24)


def check_sglang_version() -> None:
    """Raises RuntimeError if the installed SGLang is not in [0.5.17, 0.5.24)."""
    found = version("sglang")
    if not FIRST_SGLANG <= release(found) < END_OF_SGLANG:
        expected = ".".join(map(str, FIRST_SGLANG)), ".".join(map(str, END_OF_SGLANG))
        raise RuntimeError(f"sglang-tokenselect: sglang: expected >={expected[0]},<{expected[1]}, got {found}")


def untested_on_gpus() -> tuple[str, str, str] | None:
    """Name, expected and found version of a package that GPU serving was not tested with."""
    for package, expected in (("sglang", (0, 5, 17)), ("flashinfer-python", (0, 6, 15))):
        found = version(package)
        if release(found) != expected:
            return package, ".".join(map(str, expected)), found
    return None


def release(text: str) -> tuple[int, ...]:
    """'0.5.17.post1' to (0, 5, 17)."""
    parts = []
    for part in text.split(".")[:3]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)
