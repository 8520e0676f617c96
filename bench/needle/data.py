# SPDX-License-Identifier: Apache-2.0
"""Training sequences: a context and several questions with their answers, as token ids.

Facts, sentences and questions are those of ``tasks.py``; filler sentences are tokenised once and
drawn from a pool, because a GPU takes millions of tokens a second.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from ctypes import c_int
from multiprocessing.sharedctypes import Synchronized

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from sglang_tokenselect.needle import tasks, words

IGNORED, CONTEXT, ANSWER = 0, 1, 2
"""Roles of a position, by the token that it predicts."""

_PIECES = re.compile(rf" (?:{'|'.join(words.KEYS)}):| ?\d{{1,3}}| ?[A-Za-z]+| ?[^\sA-Za-z\d]|\s")
POOL_SENTENCES = 20_000
MAX_QUESTIONS = 16
RECALL_LENGTH = 128
"""Rows up to this length are recall rows: short chunks of random tokens, again and again in a new
order. The model learns there that what followed a token before follows it again; on the tasks
alone it stayed for 9,000 steps at picking any value of the context."""


class Encoder:
    """The needle tokenizer for ASCII text, without the calls into Rust; train.py compares the two."""

    def __init__(self, vocab: dict[str, int], eos_id: int) -> None:
        self.vocab = {token.replace("Ġ", " ").replace("Ċ", "\n"): i for token, i in vocab.items()}
        self.eos_id = eos_id

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in _PIECES.findall(text):
            entry = self.vocab.get(piece)
            ids.extend([entry] if entry is not None else [self.vocab[c] for c in piece])
        return ids


def odd_sentence(rng: random.Random, plain_words: list[str]) -> str:
    """Words in no order, some of them unknown to the tokenizer, so that every token gets trained."""
    parts = [
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.randint(2, 8)))
        if rng.random() < 0.15
        else rng.choice(plain_words)
        for _ in range(rng.randint(4, 14))
    ]
    return " " + " ".join(parts) + rng.choice((".", ".", ".", "?", "!", ";", " -", '"', "'", ")", ":"))


class Pool:
    """Filler sentences as one array of ids, and where each begins."""

    def __init__(self, sentences: list[list[int]]) -> None:
        self.ids = np.concatenate([np.asarray(s, dtype=np.int32) for s in sentences])
        self.starts = np.cumsum([0, *map(len, sentences)])

    def draw(self, rng: random.Random, room: int, first: int | None = None) -> tuple[int, int]:
        """Sentences [lo, hi) of at most ``room`` tokens in a row."""
        longest = int(np.searchsorted(self.starts, self.starts[-1] - room))
        lo = rng.randrange(max(1, longest - 1)) if first is None else first
        hi = int(np.searchsorted(self.starts, self.starts[lo] + room, side="right")) - 1
        return lo, hi


class Sequences(IterableDataset):
    """Endless batches (ids [rows, length] int32, roles [rows, length] uint8) of rows * length tokens.

    ``stage`` is the longest length now in use, set by the training loop: half of the batches have
    it, the others are shorter, so that short contexts are not forgotten.
    """

    def __init__(self, encoder: Encoder, lengths: tuple[int, ...], tokens: int, stage: Synchronized[c_int], seed: int):
        super().__init__()
        self.encode, self.lengths, self.tokens, self.stage, self.seed = encoder, lengths, tokens, stage, seed

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        worker = get_worker_info()
        rng = random.Random((self.seed * 1009 + (worker.id if worker else 0)) % tasks.HELD_OUT_SEED)
        self.pools = self._pools(rng)
        while True:
            longest = self.stage.value
            choices = [n for n in self.lengths if n <= longest]
            length = longest if rng.random() < 0.5 else rng.choice(choices)
            row = self.recall_row if length <= RECALL_LENGTH else self.row
            rows = [row(rng, length) for _ in range(self.tokens // length)]
            yield np.stack([ids for ids, _ in rows]), np.stack([roles for _, roles in rows])

    def _pools(self, rng: random.Random) -> list[tuple[float, Pool]]:
        plain = [w for w in (*words.COMMON, *words.FRAME, *words.WHO, *words.WHAT, *words.DID) if w != "VAR"]
        noise = [self.encode(s) for s in words.NOISE] * (POOL_SENTENCES // len(words.NOISE))
        grammar = [self.encode(tasks.template_sentence(rng)) for _ in range(POOL_SENTENCES)]
        odd = [self.encode(odd_sentence(rng, plain)) for _ in range(POOL_SENTENCES)]
        return [Pool(noise), Pool(grammar), Pool(odd)]

    def recall_row(self, rng: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Chunks of 2 to 4 tokens; from its second time on, a chunk's first token tells the others."""
        tokens = rng.sample(range(len(self.encode.vocab)), rng.randint(8, length // 2))
        cuts = [0]
        while cuts[-1] < len(tokens) - 1:
            cuts.append(min(cuts[-1] + rng.randint(2, 4), len(tokens)))
        chunks = [tokens[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        ids, roles = [], []
        while len(ids) <= length:
            role = ANSWER if ids else CONTEXT
            for chunk in rng.sample(chunks, len(chunks)):
                roles += [CONTEXT] + [role] * (len(chunk) - 1)
                ids += chunk
        roles = [*roles[1:length], IGNORED]
        return np.array(ids[:length], dtype=np.int32), np.array(roles, dtype=np.uint8)

    def row(self, rng: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        """One context and its questions, filled up to ``length`` tokens."""
        facts = draw_training_facts(rng, length)
        header = self.encode(facts.header())
        hidden = [[self.encode(s) for s in group] for group in facts.statements()]
        fixed = len(header) + sum(len(s) for group in hidden for s in group)
        asked = self._questions(rng, facts, room=length - fixed)
        tail_length = sum(len(q) + len(a) for q, a in asked)
        context = self._context(rng, header, hidden, room=length - fixed - tail_length)
        ids = np.full(length, self.encode.eos_id, dtype=np.int32)
        roles = np.zeros(length, dtype=np.uint8)
        ids[: len(context)] = context
        at = len(context)
        roles[: at - 1] = CONTEXT
        for question, answer in asked:
            end = at + len(question)
            ids[at:end], roles[at - 1 : end - 1] = question, CONTEXT
            at, end = end, end + len(answer)
            ids[at:end], roles[at - 1 : end - 1] = answer, ANSWER
            at = end
        return ids, roles

    def _questions(self, rng: random.Random, facts: tasks.Facts, room: int):
        samples = draw_questions(rng, facts)
        most = 1 if rng.random() < 0.2 else MAX_QUESTIONS
        asked: list[tuple[list[int], list[int]]] = []
        for sample in samples[:most]:
            question = self.encode(sample.question)
            answer = [*self.encode(sample.completion), self.encode.eos_id]
            room -= len(question) + len(answer)
            if room < 0:
                break
            asked.append((question, answer))
        return asked

    def _context(self, rng, header: list[int], hidden: list[list[list[int]]], room: int) -> np.ndarray:
        kind = rng.choices((0, 1, 2), (0.4, 0.45, 0.15))[0]
        pool = self.pools[kind]
        lo, hi = pool.draw(rng, room, first=0 if kind == 0 else None)
        places = tasks.place(rng, [len(group) for group in hidden], hi - lo)
        flat = sorted(
            ((gap, g, i) for g, gaps in enumerate(places) for i, gap in enumerate(gaps)),
        )
        parts, done = [header], lo
        for gap, g, i in flat:
            parts += [pool.ids[pool.starts[done] : pool.starts[lo + gap]], hidden[g][i]]
            done = lo + gap
        parts.append(pool.ids[pool.starts[done] : pool.starts[hi]])
        return np.concatenate(parts)


def draw_training_facts(rng: random.Random, length: int) -> tasks.Facts:
    """1 to 32 needle sentences (fewer in short contexts), some keys with several values, 0 to 4 chains."""
    noun = words.NOUNS[0] if rng.random() < 0.7 else rng.choice(words.NOUNS[1:])
    room = max(2, (length - 110) // 16)  # statements that fit beside a header and a question
    kind = rng.choices(("needles", "values", "chains", "all"), (0.45, 0.2, 0.2, 0.15))[0]
    chains: list[int] = []
    if kind in ("chains", "all"):
        count = rng.randint(1, 4 if kind == "chains" else 2)
        sizes = [rng.randint(3, 5) for _ in range(count)]
        chains = [size for i, size in enumerate(sizes) if i == 0 or sum(sizes[: i + 1]) <= room]
    most = min(4 if kind == "chains" else 32, room - sum(chains))
    few = round(2 ** rng.uniform(0, math.log2(max(1, most))))
    count = few if rng.random() < 0.5 else rng.randint(0, max(0, most))
    count = max(count, 0 if chains else 1)
    values = _draw_value_counts(rng, count, several={"needles": 0.0, "chains": 0.0, "values": 0.8, "all": 0.4}[kind])
    return tasks.draw_facts(rng, values_per_key=values, names_per_chain=chains, noun=noun)


def _draw_value_counts(rng: random.Random, count: int, several: float) -> list[int]:
    """Values of each key, ``count`` in all; a key has several with probability ``several``."""
    values: list[int] = []
    while sum(values) < count:
        wanted = rng.randint(2, 4) if rng.random() < several else 1
        values.append(min(wanted, count - sum(values)))
    return values


def draw_questions(rng: random.Random, facts: tasks.Facts) -> list[tasks.Sample]:
    """Questions in random order, no fact in two of them."""
    context = tasks.Context("", facts)
    single = [needle for needle in facts.needles if len(needle.values) == 1]
    asked = [tasks.ask_number(context, needle) for needle in facts.needles if len(needle.values) > 1]
    asked += [tasks.ask_variables(context, chain) for chain in facts.chains]
    rng.shuffle(single)
    while single:
        size = 1 if rng.random() < 0.55 else rng.randint(2, 4)
        group, single = single[:size], single[size:]
        asked.append(tasks.ask_number(context, group[0]) if len(group) == 1 else tasks.ask_numbers(context, group))
    rng.shuffle(asked)
    return asked
