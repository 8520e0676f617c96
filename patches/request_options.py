# SPDX-License-Identifier: Apache-2.0
"""A request's own options are checked where it enters, and its keys kept apart in the radix cache.

Symptom without it: bad options would reach the scheduler, where nothing can be answered any more; with
SGLANG_USE_PICKLE_IPC=0 nested ones would end it. And a request could be served keys that were computed while others
attended to less than it asked for. Beam search (SGLang 0.5.23), whose further rows never prefill, would reuse the
selections of whoever had those rows before.
Seam: `TokenizerManager._create_tokenized_object`, whose ValueErrors become HTTP 400. The salt is SGLang's own
`extra_key`, beside one that the request brings.
"""

from __future__ import annotations

from typing import Any

from sglang_tokenselect import flags
from sglang_tokenselect.plugin import BACKEND
from sglang_tokenselect.request_options import SALT, parse_options

from .hook import Hook


def _check_options(tokenized: Any, manager: Any, *args: Any, **kwargs: Any) -> None:
    params = getattr(tokenized, "sampling_params", None)
    if manager.server_args.attention_backend != BACKEND or params is None:
        return
    if (getattr(params, "beam_width", None) or 1) > 1:
        raise ValueError(f"beam_width: expected 1 with --attention-backend {BACKEND}, got {params.beam_width}")
    extra_key = tokenized.extra_key or ""
    if SALT in extra_key:
        raise ValueError(f"extra_key: expected none with {SALT!r} in it, got {extra_key[:200]!r}")
    if not params.custom_params:
        return
    options = parse_options(params.custom_params, flags.attached(manager.server_args).largest_budget)
    if options is None:
        return
    if tokenized.session_params is not None:
        raise ValueError("custom_params.tokenselect: expected none in a session, whose turns share their keys")
    tokenized.extra_key = extra_key + options.cache_salt


_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_TOKENIZED = "sglang.srt.managers.io_struct.TokenizedGenerateReqInput"
HOOKS = (
    Hook(
        f"{_MANAGER}._create_tokenized_object",
        "after",
        _check_options,
        ("self",),
        (
            f"{_MANAGER}.server_args",
            *(f"{_TOKENIZED}.{name}" for name in ("sampling_params", "extra_key", "session_params")),
            "sglang.srt.sampling.sampling_params.SamplingParams.custom_params",
        ),
    ),
)
