# SPDX-License-Identifier: Apache-2.0
"""TokenSelect's flags on SGLang's command line, and its keyword in `sgl.Engine`.

Symptom without it: argparse and ServerArgs refuse names they do not declare.
Seams: `ServerArgs.add_cli_args` and `ServerArgs.from_cli_args`, and `Engine.server_args_class`, a
class attribute that SGLang keeps for this purpose and that no hook can reach.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import multiprocessing
import os
import sys
from typing import Any

from sglang_tokenselect import flags, refusals
from sglang_tokenselect.config import ConfigError, TokenSelectConfig

from .hook import Hook

_SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
_ENGINE = "sglang.srt.entrypoints.engine"
_LONGER_CONTEXT = "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"


def _add_flags(result: Any, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
    flags.add_flags(parser)


def _attach_options(original: Any, cls: type, namespace: argparse.Namespace) -> Any:
    try:
        server_args, config, options_given = read_flags(original, cls, namespace)
        refusals.check_server_args(server_args, config, options_given=options_given)
    except (ConfigError, refusals.Refusal) as error:
        sys.exit(f"error: {error}")
    flags.attach(server_args, config)
    return server_args


def read_flags(original: Any, cls: type, namespace: argparse.Namespace) -> tuple[Any, TokenSelectConfig, bool]:
    """SGLang's arguments, our configuration, and whether any of its options was given; nothing is checked yet.

    Args:
        original: `ServerArgs.from_cli_args` without hooks, of `cls`.
    """
    options = flags.given_options(namespace)
    config = TokenSelectConfig.from_options(options)
    _allow_longer_context(config)
    return original(cls, namespace), config, bool(options)


def accept_engine_keyword() -> None:
    """Lets `sgl.Engine(tokenselect={...})` pass, also where plugins are loaded before the engine.

    SGLang's own processes build no engine, so there it is not imported for this.
    """
    if multiprocessing.parent_process() is None:
        importlib.import_module(_ENGINE)
    engine = sys.modules.get(_ENGINE)
    if engine is None or getattr(engine.Engine.server_args_class, "accepts_tokenselect", False):
        return
    original = engine.Engine.server_args_class

    @functools.wraps(original, updated=())
    def server_args_with_options(*, tokenselect: Any = None, **kwargs: Any) -> Any:
        config = TokenSelectConfig.from_options(tokenselect)
        _allow_longer_context(config)
        server_args = original(**kwargs)
        refusals.check_server_args(server_args, config, options_given=tokenselect is not None)
        flags.attach(server_args, config)
        return server_args

    server_args_with_options.accepts_tokenselect = True  # type: ignore[attr-defined]
    engine.Engine.server_args_class = staticmethod(server_args_with_options)


def _allow_longer_context(config: TokenSelectConfig) -> None:
    """Compact positions stay within the trained length at any context, so SGLang need not object
    to a --context-length beyond it. Set before ServerArgs reads it; child processes inherit it."""
    if config.is_compact:
        os.environ.setdefault(_LONGER_CONTEXT, "1")


HOOKS = (
    Hook(f"{_SERVER_ARGS}.add_cli_args", "after", _add_flags, ("parser",)),
    Hook(f"{_SERVER_ARGS}.from_cli_args", "around", _attach_options, ("cls", "args")),
)
