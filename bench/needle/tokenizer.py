# SPDX-License-Identifier: Apache-2.0
"""Builds the needle tokenizer: whole words, groups of up to three digits, bytes for the rest.

It is a byte-level BPE with no merges: a piece that is an entry of the vocabulary becomes that entry
(``ignore_merges``), any other piece becomes its bytes, so that every text comes back unchanged.

    python -m bench.needle.tokenizer sglang_tokenselect/needle/checkpoint
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from sglang_tokenselect.needle import words

EOS, PAD = "<|end|>", "<|pad|>"
# A key with its colon, digits in groups of three from the left, words, single marks; each takes the
# space before it. A key and its colon are one token, so that the value follows its key directly.
PIECES = rf" (?:{'|'.join(words.KEYS)}):| ?\p{{N}}{{1,3}}| ?\p{{L}}+| ?[^\s\p{{L}}\p{{N}}]|\s"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def vocabulary() -> dict[str, int]:
    """Entries in the byte-level alphabet, where a space is written as Ġ."""
    entries = [EOS, PAD, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    entries += [f"{space}{i:0{digits}}" for space in ("", "Ġ") for digits in (1, 2, 3) for i in range(10**digits)]
    spaced = {word for sentence in words.NOISE for word in sentence.replace(".", "").split()}
    for group in (words.KEYS, words.NAMES, words.FRAME, words.COMMON, words.WHO, words.HOW, words.DID):
        spaced.update(group)
    for group in (words.WHICH, words.WHAT, words.WHERE, words.WHEN, words.NEAR):
        spaced.update(group)
    # Capitalised frame words also begin lines and prompts, without a space.
    first = {word for word in (*words.FRAME, *words.COMMON) if word[0].isupper()}
    entries += [f"Ġ{word}" for word in sorted(spaced)] + [f"Ġ{key}:" for key in words.KEYS] + ["Ġ="] + sorted(first)
    return {entry: i for i, entry in enumerate(dict.fromkeys(entries))}


def build() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary(), merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True), AddedToken(PAD, special=True)])
    return tokenizer


def save(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    build().save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    save(Path(sys.argv[1]))
