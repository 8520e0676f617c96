# SPDX-License-Identifier: Apache-2.0
"""Command-line flags of the configuration, and its way from the command line to every process.

SGLang pickles `ServerArgs` into its processes with all attributes, those that it does not declare
included, so the options ride on it as `_tokenselect`.
"""

from __future__ import annotations

import argparse
from dataclasses import Field, fields
from typing import Any

from sglang_tokenselect.config import ConfigError, TokenSelectConfig, check_option, option_kind

PREFIX = "--tokenselect-"
ATTRIBUTE = "_tokenselect"


def parse_layers(text: str) -> tuple[int, ...]:
    """'0,1,30-31' to (0, 1, 30, 31)."""
    layers: set[int] = set()
    for part in filter(None, text.split(",")):
        first, dash, last = part.partition("-")
        layers.update(range(int(first), int(last if dash else first) + 1))
    return tuple(sorted(layers))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds one flag per option. A flag that is not given leaves no trace in the namespace."""
    group = parser.add_argument_group("TokenSelect", "options of --attention-backend tokenselect")
    for option in fields(TokenSelectConfig):
        is_switch = option_kind(option) is bool
        group.add_argument(
            PREFIX + option.name.replace("_", "-"),
            dest=_destination(option.name),
            default=argparse.SUPPRESS,
            help=f"{option.metadata['help']} (default: {shown_default(option)})",
            **{"action": "store_true"} if is_switch else {"type": _parser_of(option), "metavar": _metavar(option)},
        )


def given_options(namespace: argparse.Namespace) -> dict[str, Any]:
    """The options that were given on the command line."""
    names = (option.name for option in fields(TokenSelectConfig))
    return {name: getattr(namespace, _destination(name)) for name in names if hasattr(namespace, _destination(name))}


def attach(server_args: Any, config: TokenSelectConfig) -> None:
    setattr(server_args, ATTRIBUTE, config.to_options())


def attached(server_args: Any) -> TokenSelectConfig:
    """The configuration that rides on `server_args`; the defaults where none was attached."""
    return TokenSelectConfig.from_options(getattr(server_args, ATTRIBUTE, None))


def _destination(name: str) -> str:
    return f"tokenselect_{name}"


def _parser_of(option: Field) -> Any:
    name, kind = option.name, option_kind(option)
    convert = parse_layers if name == "dense_layers" else kind

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            expected = "a list such as 0,1,30-31" if name == "dense_layers" else f"a value of type {kind.__name__}"
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None
        try:
            check_option(name, value)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return value

    return parse


def _metavar(option: Any) -> str:
    choices = option.metadata.get("choices")
    return f"{{{','.join(choices)}}}" if choices else option.name.upper()


def shown_default(option: Any) -> str:
    if option.default is False:
        return "off"
    return "none" if option.default in ((), None) else str(option.default)
