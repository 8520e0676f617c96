# SPDX-License-Identifier: Apache-2.0
"""How tokens of questions are counted."""

from __future__ import annotations

import re
from collections import Counter
from types import SimpleNamespace

import pytest
from evaluations import SETTINGS

from sglang_tokenselect.evaluation import command, discover
from sglang_tokenselect.evaluation.drawer import Drawer
from sglang_tokenselect.evaluation.settings import Key
from sglang_tokenselect.evaluation.tokenizer import TokenCounter, added_tokens, load_tokenizer
from sglang_tokenselect.needle import checkpoint_path


def test_both_servers_must_have_one_tokenizer():
    servers = {name: discover.Server("u", "m", name, None, {}) for name in "ab"}
    with pytest.raises(SystemExit, match="--tokenizer: expected one that serves both, got none, and a and b by d"):
        command.common_tokenizer(servers)


@pytest.mark.parametrize("task", ["needle_multi_value", "niah_single_2", "kv_retrieval", "cwe"])
def test_what_the_server_adds_is_left_room_for(task):
    """And changes nothing else: below a length of 4,096 cwe has other lists."""
    words = SimpleNamespace(encode=lambda text, add_special_tokens: text.split())
    length, texts = 4096, {}
    for added in (0, 100):
        drawer = Drawer(SETTINGS, TokenCounter(words, added))
        sample = drawer.draw(Key("", task, length, 0, 0))
        text = sample.prompt + sample.answer_prefix
        assert 0.95 * length < len(text.split()) + sample.max_tokens + added <= length
        texts[added] = text
    if task == "cwe":
        most_common = [max(Counter(re.findall(r"[a-z]+", text)).values()) for text in texts.values()]
        assert min(most_common) >= 30


def test_tokens_that_the_server_adds_are_told_by_the_tokenizer(tokenizer):
    assert load_tokenizer(tokenizer, "completions").added == 0
    assert load_tokenizer(str(checkpoint_path()), "chat").added == 0
    template = SimpleNamespace(
        chat_template="yes",
        encode=lambda text, add_special_tokens: [0] * (len(text) + add_special_tokens),
        apply_chat_template=lambda messages, **_: f"<user>{messages[0]['content']}</user>",
    )
    assert added_tokens(template, "chat") == len("<user></user>")
    assert added_tokens(template, "completions") == 1
