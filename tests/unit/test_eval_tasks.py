# SPDX-License-Identifier: Apache-2.0
"""The tasks of `sglang-tokenselect eval`: their lengths, what the contexts hold, and their scores."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
import time
from collections import Counter

import pytest
from tokenizers import Tokenizer

from sglang_tokenselect.evaluation.tasks import ruler_words, scores, vocabulary
from sglang_tokenselect.evaluation.tasks.registry import SUITES, TASKS, Task, check, draw
from sglang_tokenselect.evaluation.tasks.sample import Sample
from sglang_tokenselect.evaluation.tasks.sizing import num_tokens
from sglang_tokenselect.needle import checkpoint_path, tasks, words

LENGTH = 6000
LONG = 131072
PIECE = 64  # No piece of filler has more tokens.
LENGTHS = (1024, 2048, 5000, 32768)
ALL = list(TASKS.values())
WITH_DEPTH = [task for task in ALL if task.has_depth]
NIAH = [task for task in ALL if task.name.startswith("niah")]
# The values that stand in needles and the keys that they belong to.
NEEDLE = re.compile(r"One special magic (?:number|uuid) of ([\w-]+) is: ([\w-]+)\.")
NUM_NEEDLES = {
    "niah_single_1": 1,
    "niah_single_2": 1,
    "niah_single_3": 1,
    "niah_multikey_1": 4,
    "niah_multivalue": 4,
    "niah_multiquery": 4,
}
NUM_ANSWERS = {
    "niah_multivalue": 4,
    "niah_multiquery": 4,
    "vt": 5,
    "cwe": 10,
    "fwe": 3,
    "needle_multi_value": 4,
    "needle_multi_query": 4,
    "needle_variable_tracking": 4,
}


def of_tasks(chosen: list[Task]):
    return pytest.mark.parametrize("task", chosen, ids=lambda task: task.name)


@pytest.fixture(scope="module")
def count_tokens():
    tokenizer = Tokenizer.from_file(str(checkpoint_path() / "tokenizer.json"))
    return lambda text: len(tokenizer.encode(text).ids)


@pytest.fixture
def sample_of(count_tokens):
    return lambda name, length=LENGTH, seed=0, index=0, depth=None: draw(
        TASKS[name], length, seed, index, count_tokens, depth
    )


def least_length(task: Task, count_tokens) -> int:
    with pytest.raises(ValueError, match=r"^length: expected at least \d+ for .*, got 20$") as told:
        draw(task, 20, 0, 0, count_tokens)
    return int(re.search(r"\d+", str(told.value)).group())


def test_the_registry_has_every_suite():
    assert {task.suite for task in ALL} == set(SUITES) == {"ruler", "infinitebench", "needle"}
    assert all(task.name == name and "\n" not in task.summary for name, task in TASKS.items())
    assert Counter(task.suite for task in ALL) == {"ruler": 11, "infinitebench": 3, "needle": 5}


def test_the_registry_is_imported_without_heavy_packages():
    code = "import sys, sglang_tokenselect.evaluation.tasks.registry; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "transformers", "tokenizers", "openai", "matplotlib", "rich"} & set(loaded)


@of_tasks(ALL)
def test_the_same_sample_is_drawn_again(task, sample_of):
    first = sample_of(task.name)
    assert first == sample_of(task.name)
    others = [sample_of(task.name, index=1), sample_of(task.name, seed=1)]
    assert len({sample.answers for sample in (first, *others)}) == 3
    assert first.answers == sample_of(task.name, 3 * LENGTH).answers
    if task.has_depth:
        assert len({sample_of(task.name, index=3, depth=depth).answers for depth in (None, 0, 0.5)}) == 1
    assert len(first.answers) == NUM_ANSWERS.get(task.name, 1) == len(set(first.answers))


@of_tasks(ALL)
def test_prompts_fill_their_length(task, count_tokens):
    for length in LENGTHS:
        if length < least_length(task, count_tokens):
            assert (task.name, length) == ("cwe", 1024)
            continue
        for index in range(2):
            short_of = length - num_tokens(draw(task, length, 0, index, count_tokens), count_tokens)
            assert 0 <= short_of <= max(PIECE, length // 100)


@of_tasks([task for task in ALL if task.suite != "needle"])
@pytest.mark.parametrize(
    "count",
    [
        lambda text: 1 + len(text) // 4,
        lambda text: 1 + len(text.split()),
        lambda text: 1 + sum(math.ceil(len(word) / 3) for word in re.findall(r"[a-zA-Z]+|\d|[^\w\s]", text)),
    ],
    ids=["letters", "words", "digits"],
)
def test_any_tokenizer_will_do(task, count):
    short_of = 4096 - num_tokens(draw(task, 4096, 0, 0, count), count)
    assert 0 <= short_of <= PIECE


@of_tasks([TASKS[name] for name in ("niah_multikey_1", "niah_multikey_2", "vt", "cwe", "fwe", "needle_multi_key")])
def test_long_prompts_are_drawn_fast(task, count_tokens):
    begin = time.monotonic()
    sample = draw(task, LONG, 0, 0, count_tokens)
    assert time.monotonic() - begin < 20
    assert 0 <= LONG - num_tokens(sample, count_tokens) <= LONG // 100


@of_tasks(ALL)
def test_a_small_length_is_told(task, count_tokens):
    least = least_length(task, count_tokens)
    assert num_tokens(draw(task, least, 0, 0, count_tokens), count_tokens) <= least
    check(task, least, 0, 0, count_tokens)
    for drawn in (draw, check):
        with pytest.raises(ValueError, match=f"^length: expected at least {least} for"):
            drawn(task, least - 1, 0, 0, count_tokens)


@of_tasks(ALL)
def test_a_check_counts_no_long_text(task, count_tokens):
    counted = []
    check(task, LONG, 0, 0, lambda text: counted.append(text) or count_tokens(text))
    assert max(map(len, counted)) < LONG / 4


@pytest.mark.parametrize("name", ["niah_multikey_2", "cwe"])
def test_a_length_for_which_words_run_out_is_told(name):
    with pytest.raises(ValueError, match=r"^words: expected at most \d+ distinct ones in a prompt, got \d+$"):
        check(TASKS[name], 1 << 22, 0, 0, lambda text: len(text) // 4)


@of_tasks(ALL)
def test_gold_answers_score_and_others_do_not(task, sample_of):
    sample = sample_of(task.name)
    drawn = (sample_of(task.name, seed=seed) for seed in range(1, 100))
    other = next(other for other in drawn if not set(other.answers) & set(sample.answers))
    assert task.score(f" {', '.join(sample.answers)}.", sample.answers) == 1
    assert task.score(f" {', '.join(other.answers)}.", sample.answers) == 0
    assert task.score("", sample.answers) == 0
    some = sample.answers[: len(sample.answers) // 2]
    assert task.score(" and ".join(some), sample.answers) == len(some) / len(sample.answers)


def test_scores_follow_the_published_rules():
    assert scores.contained("It is ABC, and 12345.", ["abc", "123", "x"]) == 2 / 3
    assert scores.first_integer("is 12345. 99 is not", ["12345"]) == 1
    assert scores.first_integer("one of 3: 12345", ["12345"]) == scores.first_integer("123456", ["12345"]) == 0
    assert scores.a_word('{"a-1": "b-2"}', ["b-2"]) == 1
    assert scores.a_word("b-21", ["b-2"]) == scores.a_word("ab-2", ["b-2"]) == 0


def place_of_fact(sample: Sample) -> float:
    """The first of two mentions for InfiniteBench's keys; headers and questions take little of the text."""
    return sample.prompt.index(sample.answers[0]) / len(sample.prompt)


@of_tasks(WITH_DEPTH)
@pytest.mark.parametrize("depth", [0, 0.25, 0.7, 1])
def test_the_fact_stands_at_its_depth(task, sample_of, depth):
    assert place_of_fact(sample_of(task.name, index=3, depth=depth)) == pytest.approx(depth, abs=0.04)


@pytest.mark.parametrize("depth", [0, 0.3, 1])
@pytest.mark.parametrize("index", range(4))
def test_other_needles_do_not_move_the_one_asked_for(sample_of, depth, index):
    sample = sample_of("niah_multikey_1", 2048, index=index, depth=depth)
    pieces = sample.prompt.splitlines()[1].replace(": ", "=").split(". ")
    filler = [piece for piece in pieces if "magic" not in piece]
    (asked,) = [place for place, piece in enumerate(pieces) if sample.answers[0] in piece]
    before = [piece for piece in pieces[:asked] if "magic" not in piece]
    assert len(before) == round(depth * len(filler)) and len(pieces) - len(filler) == 4


def test_depths_that_are_left_to_chance_spread(sample_of):
    for name in ("niah_multikey_2", "passkey", "kv_retrieval", "needle_multi_key"):
        depths = [place_of_fact(sample_of(name, index=index)) for index in range(16)]
        assert min(depths) < 0.25 and max(depths) > 0.75 and len(set(depths)) > 12


@of_tasks(ALL)
def test_wrong_depths_are_told(task, sample_of):
    expected = "0 <= depth <= 1, got 1.5" if task.has_depth else f"none for {task.name}, got 1.5"
    with pytest.raises(ValueError, match=f"^depth: expected {expected}$"):
        sample_of(task.name, depth=1.5)


@of_tasks(NIAH)
def test_needles_stand_once_and_no_two_are_equal(task, sample_of):
    sample = sample_of(task.name)
    keys, values = zip(*NEEDLE.findall(sample.prompt), strict=True)
    assert len(keys) == NUM_NEEDLES.get(task.name, len(keys)) and len(set(values)) == len(values)
    assert all(sample.prompt.count(answer) == 1 for answer in sample.answers)
    asked = {keys[values.index(answer)] for answer in sample.answers}
    assert all(key in sample.answer_prefix and key in sample.prompt.splitlines()[-1] for key in asked)
    assert len(set(keys)) == (1 if task.name == "niah_multivalue" else len(keys))
    assert not any(key in sample.answer_prefix for key in set(keys) - asked)
    if task.name in ("niah_multikey_2", "niah_multikey_3"):
        assert len(sample.prompt.splitlines()) == len(keys) + 2 and len(keys) > 50
    uuids = task.name in ("niah_single_3", "niah_multikey_3")
    assert all(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}" if uuids else r"\d{7}", v) for v in values)


def test_no_other_needle_has_the_key_asked_for(sample_of, monkeypatch):
    monkeypatch.setattr(vocabulary, "ADJECTIVES", vocabulary.ADJECTIVES[:2])
    for index in range(6):
        keys = [key for key, _ in NEEDLE.findall(sample_of("niah_multikey_2", index=index).prompt)]
        assert len(set(keys)) == len(keys) > len(words.KEYS)


def chains(prompt: str) -> list[list[tuple[str, str]]]:
    """The assignments of the solved example and of the question, in the order of the text."""
    return [re.findall(r"^VAR (\w+) = (.*)$", part, re.M) for part in prompt.split("\n\nFollow the variable")]


@pytest.mark.parametrize("index", range(5))
def test_chains_stand_in_order(sample_of, index):
    sample = sample_of("vt", index=index)
    example, asked = chains(sample.prompt)
    value = re.search(r"\d{5}:$", sample.answer_prefix).group()[:-1]
    assert asked == [
        (b, f"VAR {a}" if a else value) for a, b in zip((None, *sample.answers[:-1]), sample.answers, strict=True)
    ]
    names = [name for name, _ in example]
    assert sample.prompt.count(f": {' '.join(names)}\n") == 1 and not set(names) & set(sample.answers)
    assert [given for _, given in example[1:]] == [f"VAR {name}" for name in names[:-1]]
    assert len(asked) == len(example) == 5 and example[0][1] != value and words.NOISE[0].strip() in sample.prompt


@pytest.mark.parametrize(
    ("length", "repeats", "example_repeats"),
    [(4095, (6, 1), (3, 1)), (6000, (30, 3), (10, 3)), (LONG, (30, 3), (10, 3))],
)
def test_common_words_are_repeated_as_promised(sample_of, length, repeats, example_repeats):
    sample = sample_of("cwe", length)
    example, asked = (
        re.findall(r"(\d+)\. (\w+)", text.splitlines()[1]) for text in sample.prompt.split("The numbered list")[1:]
    )
    assert [int(number) for number, _ in asked] == list(range(1, len(asked) + 1))
    counts = Counter(word for _, word in asked)
    assert {word for word, count in counts.items() if count == repeats[0]} == set(sample.answers)
    assert {count for word, count in counts.items() if word not in sample.answers} == {repeats[1]}
    assert not {word for _, word in asked[: 10 * repeats[0]]} <= set(sample.answers)  # They are shuffled.
    solved = [word for word, count in Counter(word for _, word in example).items() if count == example_repeats[0]]
    assert len(solved) == 10 and not {word for _, word in example} & set(counts)
    assert set(re.findall(r"\d+\. (\w+)", sample.prompt.split("most often are:")[1].splitlines()[0])) == set(solved)
    assert len(Counter(word for _, word in example)) == (40 if length >= 4096 else 20)


@pytest.mark.parametrize("length", [1024, 6000, LONG])
def test_frequent_words_rank_as_the_zeta_distribution_has_it(sample_of, length):
    sample = sample_of("fwe", length)
    coded = sample.prompt.split("Count each of them. ")[1].split("\nQuestion")[0].split(" ")
    ranked = Counter(coded).most_common()
    assert [word for word, _ in ranked[:4]] == ["...", *sample.answers]
    assert ranked[3][1] > ranked[4][1]
    # The dots are 1 / zeta(2) of the words; the others follow by their rank squared.
    num_words = ranked[0][1] * math.pi**2 / 6
    assert all(abs(count - num_words * 6 / (math.pi * rank) ** 2) < 1.7 for rank, (_, count) in enumerate(ranked, 1))
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])


def test_the_first_ranks_differ_from_the_least_size_on():
    for size in range(ruler_words.LEAST_CODED, 5000):
        counts = ruler_words.coded_counts(size)
        assert counts[0] > counts[1] > counts[2] > counts[3] > counts[4] >= counts[-1] > 0


@pytest.mark.parametrize("name", ["passkey", "number_string"])
def test_a_hidden_key_stands_twice_in_one_line(sample_of, name):
    for index in range(5):
        sample = sample_of(name, 2048, index=index)
        (key,) = sample.answers
        lines = sample.prompt.split("\n\n")[1].splitlines()
        assert [line.count(key) for line in lines if line != vocabulary.NOISE_LINE] == [2]
        assert len(re.findall(r"\d+", sample.prompt)) == 2
        assert len(key) == (5 if name == "passkey" else 10)
        if name == "number_string":
            assert sum(a == b for a, b in zip(key, key[1:], strict=False)) >= 5


def test_the_json_object_holds_the_pair(sample_of):
    sample = sample_of("kv_retrieval")
    pairs = json.loads(sample.prompt[sample.prompt.index("{") : sample.prompt.index("}") + 1])
    key = re.search(r'Key: "(.*)"$', sample.prompt).group(1)
    assert pairs[key] == sample.answers[0]
    assert len({*pairs, *pairs.values()}) == 2 * len(pairs) > 100


def context_of(sample: Sample) -> str:
    return sample.prompt[: sample.prompt.rindex("\n")]


def test_needle_samples_share_contexts(sample_of):
    kinds = {
        "needle_multi_key": 16,
        "needle_multi_value": 2,
        "needle_multi_query": 4,
        "needle_variable_tracking": 2,
    }
    drawn = {name: [sample_of(name, index=index) for index in range(count + 1)] for name, count in kinds.items()}
    assert len({context_of(sample) for samples in drawn.values() for sample in samples[:-1]}) == 1
    assert len({context_of(samples[-1]) for samples in drawn.values()}) == 1
    assert len({sample.prompt for samples in drawn.values() for sample in samples}) == sum(kinds.values()) + len(kinds)


@of_tasks([task for task in ALL if task.suite == "needle"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_needle_prompts_are_those_of_the_checkpoint(task, sample_of, seed):
    sample = sample_of(task.name, seed=seed, index=1)
    context = context_of(sample)
    found = dict.fromkeys(re.findall(r" One of the special magic numbers for (\w+): \d{6}\.", context))
    values = {key: tuple(re.findall(rf" for {key}: (\d{{6}})\.", context)) for key in found}
    facts = tasks.Facts(
        tuple(tasks.Needle(key, given) for key, given in values.items()),
        tuple(tasks.Chain(value, _chain(context, name)) for name, value in re.findall(r"VAR (\w+) = (\d+)\.", context)),
    )
    whole = tasks.Context(context, facts)
    asked = [
        *tasks.questions(whole),
        *(
            tasks.ask_numbers(whole, [_owner(facts, answer) for answer in sample.answers])
            for _ in [0]
            if "query" in task.name
        ),
    ]
    prompts = {(question.prompt, frozenset(question.answers)) for question in asked}
    assert (sample.prompt + sample.answer_prefix, frozenset(sample.answers)) in prompts
    assert sample.answer_prefix.startswith("\nAnswer: The ") and sample.stop == ("\n", ".")
    assert (words.NOISE[0] in context) == (seed == 1)


def _chain(context: str, name: str) -> tuple[str, ...]:
    names = [name]
    while step := re.search(rf"VAR (\w+) = VAR {names[-1]}\.", context):
        names.append(step.group(1))
    return tuple(names)


def _owner(facts: tasks.Facts, value: str) -> tasks.Needle:
    return next(needle for needle in facts.needles if value in needle.values)


def test_words_are_distinct_and_not_parts_of_each_other():
    drawn = vocabulary.draw_words(random.Random(0), 20_000)
    assert len(set(drawn)) == 20_000 and {len(word) for word in drawn} == {5}
    rest = vocabulary.draw_words(random.Random(0), 10_000, without=drawn[:50])
    assert len(rest) == 10_000 and not set(rest) & set(drawn[:50])
    assert len(set(vocabulary.ADJECTIVES)) == len(vocabulary.ADJECTIVES)


@pytest.mark.parametrize("kind", ["words", "numbers", "uuids"])
def test_keys_and_values_are_distinct(kind):
    drawn = vocabulary.draw_distinct(random.Random(0), kind, 5000)
    # The same draws again: all that were drawn first are to be left out.
    others = vocabulary.draw_distinct(random.Random(0), kind, 5000, without=drawn)
    assert len({*drawn, *others}) == 10_000


def test_too_many_keys_are_told():
    most = len(vocabulary.ADJECTIVES) * len(words.KEYS)
    with pytest.raises(ValueError, match=f"^words: expected at most {most} distinct ones in a prompt, got {most + 1}$"):
        vocabulary.draw_distinct(random.Random(0), "words", most + 1)
