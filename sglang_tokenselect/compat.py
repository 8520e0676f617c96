# SPDX-License-Identifier: Apache-2.0
"""The SGLang versions that the hooks were checked against. The only place that compares versions."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

FIRST_SGLANG = (0, 5, 17)
END_OF_SGLANG = (0, 5, 24)


def check_sglang_version() -> None:
    """Raises RuntimeError if the installed SGLang is not in [0.5.17, 0.5.24)."""
    found = found_sglang()
    if not FIRST_SGLANG <= release(found) < END_OF_SGLANG:
        raise RuntimeError(f"sglang-tokenselect: sglang: expected {expected_sglang()}, got {found}")


def found_sglang() -> str:
    return version("sglang")


def expected_sglang() -> str:
    """'>=0.5.17,<0.5.24'."""
    return f">={_join(FIRST_SGLANG)},<{_join(END_OF_SGLANG)}"


def untested_on_gpus() -> tuple[str, str, str] | None:
    """Name, expected and found version of a package that GPU serving was not tested with."""
    for package, expected in (("sglang", (0, 5, 17)), ("flashinfer-python", (0, 6, 15))):
        found = find_version(package) or "none"
        if release(found) != expected:
            return package, _join(expected), found
    return None


def find_version(package: str) -> str | None:
    """None: not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
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


def _join(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
