# SPDX-License-Identifier: Apache-2.0
"""The needle tasks and the tokenizer that is shipped with the needle checkpoint."""

from __future__ import annotations

import json
import random

import pytest
from tokenizers import Tokenizer

from sglang_tokenselect.needle import checkpoint_path, tasks, words

SIZE_LIMIT = 6_000_000
TEXTS = (
    "",
    "Hello, world!",
    "  two  spaces,\ttabs\r\n and\n\nlines ",
    "naïve café — “quotes” … 日本語 中文 한국어 العربية हिन्दी",
    "emoji 👩‍👩‍👧‍👦 and combining A\u0301 \u200b \u2028 \x00\x7f",
    "numbers 1 12 123 1234 123456 1234567 3.14159 ½ ٣٤٥",
    " amber: 123456 amber:123 amber :7 AMBER: 8",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint_path() / "tokenizer.json"))


@pytest.fixture(scope="module")
def count_tokens(tokenizer):
    return lambda text: len(tokenizer.encode(text).ids)


def all_questions(context: tasks.Context) -> list[tasks.Sample]:
    asked = tasks.questions(context)
    if all(len(needle.values) == 1 for needle in context.facts.needles):
        asked += tasks.questions(context, keys_per_question=2)
    return asked


@pytest.mark.parametrize("haystack", ["noise", "sentences"])
@pytest.mark.parametrize("values_per_key", [1, 4])
def test_contexts_are_deterministic_and_hold_the_answers(count_tokens, haystack, values_per_key):
    def make(seed: int) -> tasks.Context:
        return tasks.make_context(
            tasks.held_out(seed),
            1024,
            count_tokens=count_tokens,
            num_needles=16,
            values_per_key=values_per_key,
            num_chains=2,
            haystack=haystack,
        )

    context = make(5)
    assert context == make(5)
    assert context.text != make(6).text
    assert 1024 - 30 < count_tokens(context.text) <= 1024
    for needle in context.facts.needles:
        for value in needle.values:
            assert f" {needle.key}: {value}." in context.text
    for chain in context.facts.chains:
        steps = [f" VAR {chain.names[0]} = {chain.value}."]
        steps += [f" VAR {b} = VAR {a}." for a, b in zip(chain.names, chain.names[1:], strict=False)]
        places = [context.text.index(step) for step in steps]
        assert places == sorted(places)


def test_questions_have_answers_that_score_one(count_tokens):
    context = tasks.make_context(7, 800, count_tokens=count_tokens, num_needles=6, num_chains=1, hops=2)
    asked = all_questions(context)
    assert {sample.task for sample in asked} == {"multi_key", "multi_query", "variable_tracking"}
    assert len(asked) == 6 + 1 + 3 + 1
    for sample in asked:
        assert sample.prompt == context.text + sample.question
        assert tasks.score(sample.completion, sample.answers) == 1.0
        assert not any(answer in sample.question for answer in sample.answers)


def test_task_names(count_tokens):
    one = tasks.make_context(1, 300, count_tokens=count_tokens, num_needles=1)
    several = tasks.make_context(1, 300, count_tokens=count_tokens, num_needles=4, values_per_key=2)
    assert [sample.task for sample in tasks.questions(one)] == ["single"]
    assert [sample.task for sample in tasks.questions(several)] == ["multi_value"] * 2


def test_groups_of_three_digits_are_distinct_in_a_context():
    facts = tasks.draw_facts(random.Random(0), values_per_key=[4] * 8, names_per_chain=[5, 5])
    values = [v for needle in facts.needles for v in needle.values] + [chain.value for chain in facts.chains]
    groups = [value[i : i + 3] for value in values for i in (0, 3)]
    assert len(set(groups)) == len(groups) == 2 * 34


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_depth_of_the_first_needle(count_tokens, depth):
    context = tasks.make_context(3, 2000, count_tokens=count_tokens, num_needles=1, depth=depth)
    before = context.text.index(context.facts.needles[0].values[0]) / len(context.text)
    assert before == pytest.approx(depth, abs=0.05)


def test_score_is_the_fraction_of_strings_contained():
    assert tasks.score(" amber: 123456, birch: 1.", ["123456", "654321"]) == 0.5
    assert tasks.score("", ["1"]) == 0.0


def test_held_out_seeds_are_apart_from_training_seeds():
    assert tasks.held_out(0) == tasks.HELD_OUT_SEED
    with pytest.raises(ValueError, match="index: expected"):
        tasks.held_out(-1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": 40}, "num_tokens: expected at least"),
        ({"num_needles": 5, "values_per_key": 2}, "num_needles: expected a multiple"),
        ({"haystack": "essays"}, "haystack: expected"),
    ],
)
def test_refusals(count_tokens, arguments, message):
    arguments = {"num_tokens": 500} | arguments
    with pytest.raises(ValueError, match=message):
        tasks.make_context(0, arguments.pop("num_tokens"), count_tokens=count_tokens, **arguments)


def test_tokenizer_gives_back_any_text(tokenizer):
    rng = random.Random(0)
    drawn = "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(1, 0xD800)))) for _ in range(60))
    for text in (*TEXTS, drawn):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_words_and_values_are_few_tokens(tokenizer):
    def pieces(text: str) -> list[str]:
        return tokenizer.encode(text).tokens

    assert pieces(" amber: 123456.") == ["Ġamber:", "Ġ123", "456", "."]
    assert all(len(pieces(f" {word}")) == 1 for word in (*words.KEYS, *words.NAMES))
    assert all(len(pieces(f" {key}:")) == 1 for key in words.KEYS)
    rng = random.Random(0)
    for _ in range(200):
        sentence = tasks.template_sentence(rng)
        assert len(pieces(sentence)) == len(sentence.split()) + 1


def test_a_prompt_is_the_tokens_of_its_parts(tokenizer, count_tokens):
    """So that a question extends a cached context."""
    context = tasks.make_context(9, 600, count_tokens=count_tokens, num_chains=1)
    for sample in all_questions(context):
        parts = (context.text, sample.question, sample.completion)
        whole = tokenizer.encode("".join(parts)).ids
        assert whole == [i for part in parts for i in tokenizer.encode(part).ids]


def test_checkpoint_is_small_and_plain_llama():
    files = [path for path in checkpoint_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= SIZE_LIMIT
    config = json.loads((checkpoint_path() / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["head_dim"] == 64
    assert config["rope_scaling"] is None
    assert config["max_position_embeddings"] == 4096


def test_chat_template_joins_the_messages():
    config = json.loads((checkpoint_path() / "tokenizer_config.json").read_text())
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint_path())
    messages = [{"role": "system", "content": "A context.\n"}, {"role": "user", "content": "A question"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "A context.\nA question"
    assert tokenizer.eos_token == config["eos_token"]
