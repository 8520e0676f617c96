# SPDX-License-Identifier: Apache-2.0
"""`sglang-tokenselect ctl`: one command to a running server."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import msgspec
import zmq

from sglang_tokenselect.config import ConfigError, TokenSelectConfig, check_option, option_kind
from sglang_tokenselect.controller import RUNTIME_OPTIONS
from sglang_tokenselect.sockets import open_client

KINDS = {option.name: option_kind(option) for option in fields(TokenSelectConfig)}


class Answer(msgspec.Struct):
    """What control.py answers."""

    ok: bool
    config: dict[str, str | int | float | bool | None] = {}
    error: str = ""
    snapshot: dict[str, Any] | None = None


def run_ctl(request: Mapping[str, Any], endpoint: str, *, as_json: bool, timeout: float) -> int:
    """Sends the request and prints the options that the server has then, or on stderr why they are not told.

    Args:
        timeout: seconds to wait for the answer.

    Returns:
        The exit code.
    """
    try:
        with open_client(zmq.REQ, endpoint) as client:
            client.send(json.dumps(request).encode())
            if not client.poll(round(1000 * timeout)):
                return _fail(f"ctl: expected an answer from {endpoint} within {timeout:g} s, got none")
            reply = client.recv()
    except ConfigError as error:
        return _fail(str(error))
    try:
        answer = msgspec.json.decode(reply, type=Answer)
    except (msgspec.DecodeError, RecursionError):
        return _fail(f"ctl: expected an answer of a TokenSelect server from {endpoint}, got {reply[:80]!r}")
    if not answer.ok:
        return _fail(answer.error)
    print(json.dumps(json.loads(reply)) if as_json else aligned(answer.config))
    return 0


def parse_setting(text: str) -> tuple[str, Any]:
    """'level=2' to ('level', 2); `none` is None."""
    name, _, value = text.partition("=")
    if name not in RUNTIME_OPTIONS:
        names = ", ".join(RUNTIME_OPTIONS)
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE with a name of {names}, got {text!r}")
    try:
        setting = None if value == "none" else KINDS[name](value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a value of type {KINDS[name].__name__}, got {text!r}") from None
    try:
        check_option(name, setting)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name, setting


def aligned(config: Mapping[str, Any]) -> str:
    width = max(map(len, config), default=0)
    return "\n".join(f"{name:{width}}  {'none' if value is None else value}" for name, value in config.items())


def _fail(text: str) -> int:
    print(text, file=sys.stderr)
    return 1
