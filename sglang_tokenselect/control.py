# SPDX-License-Identifier: Apache-2.0
"""Commands to a running server: a request's bytes in, the answer's bytes out. JSON both ways.

    {"command": "get"}                                  the options that can be changed, and the latest snapshot
    {"command": "set", "options": {"policy": "load"}}   changes options, all of them or none

Answers are {"ok": true, "config": {...}} or {"ok": false, "error": "name: expected ..., got ..."}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from sglang_tokenselect.config import ConfigError, TokenSelectConfig
from sglang_tokenselect.controller import RUNTIME_OPTIONS

if TYPE_CHECKING:
    from sglang_tokenselect.snapshot import Snapshot

MAX_REQUEST_BYTES = 64 * 1024
MAX_ERROR_CHARS = 300
MAX_INTEGER_CHARS = 18
"""Any integer of so many digits fits into 64 bits."""

FIELDS = {"get": {"command"}, "set": {"command", "options"}}


class Configurable(Protocol):
    """What of a Controller is needed here."""

    @property
    def config(self) -> TokenSelectConfig: ...

    def configure(self, changes: Mapping[str, Any]) -> TokenSelectConfig: ...


def answer(request: bytes, controller: Configurable, snapshot: Snapshot | None) -> bytes:
    """Carries out one request.

    Args:
        snapshot: the latest; None before the first.
    """
    try:
        message = _parse(request)
        if message["command"] == "get":
            return _encode(
                ok=True,
                config=_runtime_options(controller.config),
                snapshot=None if snapshot is None else snapshot.to_dict(),
            )
        return _encode(ok=True, config=_runtime_options(controller.configure(message["options"])))
    except ConfigError as error:
        return refusal(error)


def refusal(error: Exception) -> bytes:
    text = str(error)
    return _encode(ok=False, error=text if len(text) <= MAX_ERROR_CHARS else text[: MAX_ERROR_CHARS - 3] + "...")


def _parse(request: bytes) -> dict[str, Any]:
    """Raises ConfigError unless the request is one of those above, whatever its options' names and values."""
    if len(request) > MAX_REQUEST_BYTES:
        raise ConfigError("request", f"at most {MAX_REQUEST_BYTES} bytes", len(request))
    try:
        message = json.loads(
            request.decode(),
            object_pairs_hook=_unique_names,
            parse_constant=_refuse_constant,
            parse_int=_parse_integer,
        )
    except ConfigError:
        raise
    except (ValueError, RecursionError):
        raise ConfigError("request", "JSON in UTF-8", request[:MAX_ERROR_CHARS]) from None
    if not isinstance(message, dict):
        raise ConfigError("request", "an object", _kind(message))
    _check_fields(message)
    if "options" in message:
        _check_options(message["options"])
    return message


def _check_fields(message: dict[str, Any]) -> None:
    command = message.get("command")
    if not isinstance(command, str) or command not in FIELDS:
        raise ConfigError("command", f"one of {', '.join(FIELDS)}", command if isinstance(command, str) else None)
    if message.keys() != FIELDS[command]:
        raise ConfigError(
            "request", f"the fields {', '.join(sorted(FIELDS[command]))} with {command}", ", ".join(message)
        )


def _check_options(options: Any) -> None:
    if not isinstance(options, dict) or not options:
        raise ConfigError("options", "an object with at least one option", _kind(options))
    for name, value in options.items():
        if isinstance(value, (dict, list)):
            raise ConfigError(name, "a string, a number, true, false or null", _kind(value))


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ConfigError("request", "each name once in an object", ", ".join(name for name, _ in pairs))
    return names


def _refuse_constant(text: str) -> None:
    raise ConfigError("request", "finite numbers", text)


def _parse_integer(text: str) -> int:
    if len(text) > MAX_INTEGER_CHARS:
        raise ConfigError("request", f"integers of up to {MAX_INTEGER_CHARS} characters", text)
    return int(text)


def _kind(value: Any) -> str:
    """Of a value that may be too large to be shown."""
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (dict, list, str)) else repr(value)


def _runtime_options(config: TokenSelectConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in RUNTIME_OPTIONS}


def _encode(**message: Any) -> bytes:
    return json.dumps(message, allow_nan=False).encode()
