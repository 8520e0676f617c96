# SPDX-License-Identifier: Apache-2.0
"""Entry point of `sglang.srt.plugins`: called once in each SGLang process that loads plugins."""

from __future__ import annotations

from typing import Any

from sglang_tokenselect.compat import check_sglang_version

BACKEND = "tokenselect"


def register() -> None:
    """Makes `--attention-backend tokenselect` and its flags known. A second call changes nothing.

    SGLang logs what is raised here and goes on without the plugin, so everything that can fail
    comes before anything is registered.
    """
    check_sglang_version()
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend
    from sglang.srt.server_args import add_attention_backend_choices

    from sglang_tokenselect.patches import install, server_args

    is_new = BACKEND not in ATTENTION_BACKENDS
    if is_new:
        install.check()
    server_args.accept_engine_keyword()
    if is_new:
        install.install()
        add_attention_backend_choices([BACKEND])
        register_attention_backend(BACKEND)(create_backend)


def create_backend(model_runner: Any) -> Any:
    from sglang_tokenselect.backend import TokenSelectAttnBackend

    return TokenSelectAttnBackend(model_runner)
