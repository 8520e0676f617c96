# SPDX-License-Identifier: Apache-2.0
"""Keys, values and words of the tasks, all distinct within a sample."""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Collection, Iterator
from typing import Literal

from sglang_tokenselect.needle import tasks, words

Kind = Literal["words", "numbers", "uuids"]

ADJECTIVES = """
able absent active agile alert ancient angry annual arid atomic avid aware awful awkward bald basic bitter blank bleak
blind blunt bold brave brief bright brisk broad busy calm candid careful casual certain charming cheap cheerful chief
chilly civil classic clean clear clever clumsy cold common complex content cool costly crazy crisp crooked crude cruel
curious curly cute daily damp dapper daring dark dear decent deep dense dim direct dizzy double drab dreamy dry dull
dusty eager early earnest easy elegant empty endless equal exact exotic faint fair faithful famous fancy fast fatal
feeble fierce fine firm flat fluffy fond foreign formal fragile frank free fresh friendly frosty frozen full funny
fuzzy gentle giant gifted glad gleaming global gloomy glossy golden good graceful grand grave great greedy grim gross
grumpy handy happy hard harsh hasty heavy helpful hidden hollow honest hot huge humble hungry icy ideal idle immense
inner jolly joyful just keen kind large lasting late lazy lean light likely little lively local lonely long loose loud
loyal lucky lush mad main major married massive mellow merry mighty mild minor misty modern modest moist muddy narrow
native neat nervous new nice noble noisy normal novel odd old open oval pale patient perfect placid plain plump polite
poor prime private proper proud public pure quaint quick quiet rapid rare raw ready real rich rigid ripe robust rough
round royal rude rural rusty sad safe sane scarce serene severe shallow sharp shiny short shy silent silky simple
sincere sleepy slender slim slow small smart smooth snug sober soft solid sour spare spicy square stable stale steady
steep stiff still strange strict strong sturdy subtle sudden sunny super sweet swift tall tame tart tender tense thick
thin tidy tight timid tiny tired tough tranquil true usual vague vast vital vivid warm wary weary weird wet wide wild
wise witty wooden worthy young zealous zesty
""".split()  # noqa: SIM905 (a list literal takes a line for each word)
NOISE_LINE = "".join(words.NOISE).strip()
"""RULER's and InfiniteBench's filler: five sentences."""
NUMBERS = range(10**6, 10**7)
WORD_LETTERS = 5
_CONSONANTS, _VOWELS = "bdfgklmnprstvwyz", "aeiou"
_WORDS = range(len(_CONSONANTS) ** 3 * len(_VOWELS) ** 2)


def draw_distinct(rng: random.Random, kind: Kind, count: int, without: Collection[str] = ()) -> list[str]:
    """Keys or values: adjective-noun pairs, numbers of seven digits, or UUIDs; none of them is in `without`."""
    if kind == "uuids":
        drawn = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(count + len(without))]
    elif kind == "numbers":
        drawn = [str(number) for number in _pick(rng, NUMBERS, count + len(without), kind)]
    else:
        pairs = _pick(rng, range(len(ADJECTIVES) * len(words.KEYS)), count + len(without), kind)
        drawn = [f"{ADJECTIVES[pair // len(words.KEYS)]}-{words.KEYS[pair % len(words.KEYS)]}" for pair in pairs]
    taken = set(without)
    return [item for item in drawn if item not in taken][:count]


def draw_words(rng: random.Random, count: int, without: Collection[str] = ()) -> list[str]:
    """Pronounceable words of five letters, such as `tovik`.

    All are equally long, so none is a part of another and a score cannot take one for another.
    """
    taken = set(without)
    drawn = (_word(code) for code in _pick(rng, _WORDS, count + len(taken), "words"))
    return [word for word in drawn if word not in taken][:count]


def draw_letters(rng: random.Random, count: int, num_letters: int, alphabet: str = string.ascii_lowercase) -> list[str]:
    """Words of random letters."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn["".join(rng.choices(alphabet, k=num_letters))] = None
    return list(drawn)


def sentences(rng: random.Random) -> Iterator[str]:
    """Endless sentences of varied words, without a key or a number."""
    while True:
        yield tasks.template_sentence(rng).strip()


def _pick(rng: random.Random, population: range, count: int, name: str) -> list[int]:
    if count > len(population):
        raise ValueError(f"{name}: expected at most {len(population)} distinct ones in a prompt, got {count}")
    return rng.sample(population, count)


def _word(code: int) -> str:
    letters = []
    for place in range(WORD_LETTERS):
        alphabet = _VOWELS if place % 2 else _CONSONANTS
        code, letter = divmod(code, len(alphabet))
        letters.append(alphabet[letter])
    return "".join(letters)
