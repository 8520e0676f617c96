# SPDX-License-Identifier: Apache-2.0
"""Counts tokens as the server's model does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_tokenselect.evaluation.settings import Api

NO_LIMIT = 1 << 40


@dataclass(frozen=True, eq=False)  # told apart and hashed by identity: tasks keep what they drew by it
class TokenCounter:
    """
    Attributes:
        added: tokens that the server puts around a text: special ones, or those of the chat template.
    """

    tokenizer: Any
    added: int

    def __call__(self, text: str) -> int:
        """Tokens of a piece of text, without special ones."""
        return _count(self.tokenizer, text, False)

    def whole(self, text: str) -> int:
        """Tokens of a text as the server reads it."""
        return self(text) + self.added


def load_tokenizer(name: str, api: Api) -> TokenCounter:
    """
    Args:
        name: a folder, or a name on the Hugging Face hub.
        api: how the texts will be sent.

    Raises:
        SystemExit: it cannot be loaded, or cannot do what its model's chats need.
    """
    try:
        tokenizer = _load(name)
        return TokenCounter(tokenizer, added_tokens(tokenizer, api))
    except Exception as error:  # of many kinds, from the hub's client, from transformers, from files and chat templates
        reason = str(error).strip().splitlines()[:1] or [repr(error)]
        raise SystemExit(
            f"tokenizer: expected one in {name!r}, got {type(error).__name__}: {reason[0]}\n"
            "Give the folder or name of the model's tokenizer with --tokenizer."
        ) from None


def _load(name: str) -> Any:
    folder = Path(name)
    alone = folder / "tokenizer.json"
    if alone.is_file() and not any((folder / file).exists() for file in ("tokenizer_config.json", "config.json")):
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(alone))
    from transformers import AutoTokenizer

    # It warns of texts beyond its model's length, which are what is wanted here.
    return AutoTokenizer.from_pretrained(name, model_max_length=NO_LIMIT)


def added_tokens(tokenizer: Any, api: Api) -> int:
    if api == "chat" and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": "a"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return _count(tokenizer, text, False) - _count(tokenizer, "a", False)
    return _count(tokenizer, "a", True) - _count(tokenizer, "a", False)


def _count(tokenizer: Any, text: str, has_special: bool) -> int:
    """Of both libraries' tokenizers, whose results differ in form."""
    encoded = tokenizer.encode(text, add_special_tokens=has_special)
    return len(getattr(encoded, "ids", encoded))
