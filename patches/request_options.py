# SPDX-License-Identifier: Apache-2.0
"""A request that asks for TokenSelect options of its own gets a 400, since none are served yet.

Symptom without it: `custom_params` with a "tokenselect" key would be ignored without a word.
Seam: `TokenizerManager._create_tokenized_object`, whose ValueErrors become HTTP 400.
"""

from __future__ import annotations

from typing import Any

from .hook import Hook

KEY = "tokenselect"


def _refuse_options(original: Any, manager: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
    params = getattr(obj, "sampling_params", None) or {}
    custom = params.get("custom_params") if isinstance(params, dict) else None
    if isinstance(custom, dict) and KEY in custom:
        raise ValueError(
            f"custom_params: expected no {KEY!r} (options per request are not served yet), got {custom[KEY]!r}"
        )
    return original(manager, obj, *args, **kwargs)


HOOKS = (
    Hook("sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object", "around", _refuse_options),
)
