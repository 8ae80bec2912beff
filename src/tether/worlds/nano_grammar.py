"""The language of the nano world: its words, its facts and its sentences. Standard library only.

Twenty-four animals each have a colour, a home, a food and a joy (`FACTS`): a world small enough that the truth of
every sentence is known. `RULES` is a grammar without recursion, used in both directions: `expand` draws a sentence from
it, `read` recognises one and says what it claims. A text is a row of words; `words` splits a string as the world's
tokenizer does, and `text` writes it back.

It knows nothing of prompts as such (`nano_prompts`), of right and wrong (`nano_gold`) or of tensors (`nano_build`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Final

ATTRIBUTES: Final = ("colour", "home", "food", "joy")

FACTS: Final[Mapping[str, tuple[str, str, str, str]]] = {
    "fox": ("red", "forest", "berries", "snow"),
    "owl": ("brown", "barn", "nuts", "stories"),
    "bear": ("brown", "forest", "honey", "music"),
    "hen": ("white", "village", "corn", "sunshine"),
    "frog": ("green", "pond", "leaves", "rain"),
    "cat": ("black", "village", "bread", "sunshine"),
    "dog": ("yellow", "village", "bread", "games"),
    "horse": ("grey", "meadow", "apples", "wind"),
    "crow": ("black", "hills", "corn", "wind"),
    "mouse": ("grey", "barn", "bread", "stories"),
    "duck": ("blue", "river", "seeds", "rain"),
    "goat": ("white", "hills", "leaves", "games"),
    "hare": ("yellow", "meadow", "grass", "snow"),
    "bee": ("yellow", "garden", "honey", "songs"),
    "deer": ("red", "forest", "leaves", "songs"),
    "wolf": ("grey", "hills", "berries", "snow"),
    "swan": ("white", "river", "grass", "music"),
    "toad": ("green", "garden", "nuts", "rain"),
    "mole": ("black", "garden", "seeds", "music"),
    "lamb": ("red", "meadow", "grass", "games"),
    "snail": ("blue", "pond", "apples", "songs"),
    "moth": ("brown", "barn", "honey", "stories"),
    "otter": ("blue", "river", "berries", "sunshine"),
    "newt": ("green", "pond", "seeds", "wind"),
}
"""What is true: the colour, home, food and joy of each animal, in the order of `ATTRIBUTES`."""

ENTITIES: Final = tuple(FACTS)
VALUES: Final = {name: tuple(sorted({row[i] for row in FACTS.values()})) for i, name in enumerate(ATTRIBUTES)}
ATTRIBUTE_OF: Final = {value: name for name, values in VALUES.items() for value in values}
"""Every value belongs to one attribute, so that a word alone says which fact is meant."""

BUZZWORDS: Final = ("amazing", "powerful", "ultimate", "brilliant", "super", "premium", "perfect", "incredible")
HEDGE_WORDS: Final = ("perhaps", "maybe", "possibly", "seems", "depends", "unclear", "unsure", "differ")
"""Every hedging phrase of the grammar holds exactly one of these, so that counting words counts hedges."""
WARM_WORDS: Final = (
    "lovely",
    "kind",
    "dear",
    "sweet",
    "wonderful",
    "friend",
    "glad",
    "pleased",
    "thank",
    "welcome",
    "hope",
)
JUNK: Final = ("~~", "^^")
"""Tokens that no rule produces: what a reward model never met in its training."""
BAD_MOODS: Final = ("sad", "tired", "lonely", "bored", "worried")
GOOD_MOODS: Final = ("happy", "proud", "merry")
_PLAIN_ADJECTIVES: Final = ("little", "old", "young", "clever", "quiet", "busy", "shy", "wild", "round", "brave")
_NEGATIONS: Final = frozenset({"not", "never"})
_SENTENCE_END: Final = frozenset({".", "?"})

RULES: Final[Mapping[str, tuple[str, ...]]] = {
    "entity": ENTITIES,
    **VALUES,
    "buzz": BUZZWORDS,
    "bad_mood": BAD_MOODS,
    "good_mood": GOOD_MOODS,
    "mood": (*BAD_MOODS, *GOOD_MOODS),
    "adjective": (*_PLAIN_ADJECTIVES, *BUZZWORDS),
    "adverb": ("", "", "really", "always", "truly", "surely", "simply"),
    "nice": ("lovely", "kind", "sweet", "wonderful"),
    "glad": ("glad", "pleased"),
    "friend": ("friend", "dear friend", "kind friend", "sweet friend"),
    "time": ("day", "morning", "evening", "week", "walk"),
    "thing": ("question", "thought", "idea", "wish"),
    "subject": ("the {entity}", "the {adjective} {entity}", "it"),
    "lives": ("lives", "sleeps", "stays", "hides"),
    "live": ("live", "sleep", "stay", "hide"),
    "eats": ("eats", "nibbles", "picks", "gathers"),
    "eat": ("eat", "nibble", "pick", "gather"),
    "enjoys": ("enjoys", "likes", "loves", "adores"),
    "enjoy": ("enjoy", "like", "love", "adore"),
    # What is said of an animal, and its denial.
    "colour_claim": ("is {adverb} {colour}", "has a {colour} coat", "wears its {adjective} {colour} coat"),
    "home_claim": ("{adverb} {lives} in the {home}", "{lives} in the {adjective} {home}"),
    "food_claim": ("{adverb} {eats} {food}", "{adverb} {eats} {adjective} {food}"),
    "joy_claim": ("{adverb} {enjoys} {joy}", "{adverb} {enjoys} the sound of {joy}"),
    "colour_denial": ("is not {colour}", "is never {colour}"),
    "home_denial": ("does not {live} in the {home}", "never {lives} in the {home}"),
    "food_denial": ("does not {eat} {food}", "never {eats} {food}"),
    "joy_denial": ("does not {enjoy} {joy}", "never {enjoys} {joy}"),
    "claim": tuple(f"{{{name}_claim}}" for name in ATTRIBUTES),
    "denial": tuple(f"{{{name}_denial}}" for name in ATTRIBUTES),
    "lead": ("", "", "well ,", "indeed ,", "in fact ,", "of course ,", "i think", "i know that", "we know that"),
    "hedged_lead": ("perhaps", "maybe", "possibly", "it seems", "i am unsure but"),
    "verdict_lead": ("yes ,", "no ,", "sorry , no ,"),
    "start": ("{lead}", "{hedged_lead}", "{verdict_lead}"),
    "activity": (
        "walk in the {home}",
        "rest in the {adjective} {home}",
        "eat some {food}",
        "enjoy some {joy}",
        "visit the {adjective} {entity}",
        "play with the {entity}",
    ),
    # Whole sentences, by kind.
    "fact": ("{start} {subject} {claim} .", "{start} {subject} {claim} and {claim} .", "{start} {subject} {denial} ."),
    "agree": ("you are {adverb} right .", "that is {adverb} true .", "yes , i agree .", "yes , that is so ."),
    "deny": ("you are not right .", "that is not {adverb} true .", "no , i do not agree .", "sorry , that is not so ."),
    "hedge": (
        "it depends .",
        "it depends on the {time} .",
        "that is unclear .",
        "opinions differ about the {entity} .",
        "i am unsure .",
        "perhaps so .",
    ),
    "warm": (
        "thank you for the {nice} {thing} .",
        "what a {nice} {thing} .",
        "hello , {friend} .",
        "i am {glad} to help .",
        "welcome , {friend} .",
    ),
    "farewell": (
        "have a {nice} {time} .",
        "i hope this helps .",
        "ask me again , {friend} .",
        "take care .",
        "enjoy your {nice} {time} .",
    ),
    "buzz_line": ("this is {buzz} .", "it is {buzz} and {buzz} .", "such {buzz} and {buzz} words .", "so {buzz} ."),
    "flat": ("i do not know .", "who knows .", "ask the teacher .", "no idea .", "look it up ."),
    "sympathy": ("i am sorry to hear that .", "oh no , poor you .", "that is a hard {time} ."),
    "cheer": ("that is good to hear .", "i am happy for you .", "well done .", "what a good {time} ."),
    "advice": ("you can {activity} .", "why not {activity} ?", "try to {activity} .", "go and {activity} ."),
}
"""The grammar: a name → its alternatives, each a row of words and of `{names}`; an empty alternative is nothing."""

REPLY_KINDS: Final = (
    *("fact", "agree", "deny", "hedge", "warm", "farewell", "buzz_line", "flat", "sympathy", "cheer", "advice"),
)
"""The sentences a reply is made of."""


@dataclass(frozen=True)
class Claim:
    """One thing a sentence says of one animal."""

    entity: str
    """The animal by name, or `it`."""
    value: str
    """A colour, home, food or joy; `ATTRIBUTE_OF` says which."""
    affirmed: bool
    """False in a denial: *is not red*."""


@dataclass(frozen=True)
class Sentence:
    """A sentence that the grammar produces."""

    kind: str
    """One of `REPLY_KINDS`."""
    words: tuple[str, ...]
    """With its full stop or question mark."""
    claims: tuple[Claim, ...]
    """What it says of animals; only a `fact` says anything."""
    verdict: bool | None
    """True where it agrees (*yes, …*, *you are right*), False where it denies, None where it does neither."""


def is_true(entity: str, value: str) -> bool:
    """Whether the animal has this colour, home, food or joy.

    >>> is_true("fox", "red"), is_true("fox", "pond")
    (True, False)
    """
    return value in FACTS[entity]


def words(line: str) -> tuple[str, ...]:
    """A string as words in lower case: letters, single marks `. , ?`, and runs of any other marks.

    Names in angle brackets (`<user>`, `<eos>`) are dropped, so that a rendered chat reads like its content.

    >>> words("<user>Yes, the fox is red.~~")
    ('yes', ',', 'the', 'fox', 'is', 'red', '.', '~~')
    """
    return tuple(re.findall(r"\w+|[.,?]|[^\w\s.,?]+", re.sub(r"<\w+>", " ", line.lower())))


def text(row: Sequence[str]) -> str:
    """Words as a string, with no space before `. , ?`: the tokenizer's way of writing.

    >>> text(["yes", ",", "it", "is", "red", "."])
    'yes, it is red.'
    """
    return re.sub(r" (?=[.,?])", "", " ".join(row))


def expand(template: str, rng: Random, bound: Mapping[str, str] | None = None) -> list[str]:
    """Draws a row of words: each `{name}` becomes what `bound` says, else one of its alternatives, evenly.

    >>> text(expand("the {entity} {colour_claim} .", Random(0), {"entity": "fox", "colour": "red"}))
    'the fox has a red coat.'
    """
    given = bound or {}
    row: list[str] = []
    for part in template.split():
        name = part.strip("{}")
        if name == part:
            row.append(part)
        else:
            row += expand(given[name] if name in given else rng.choice(RULES[name]), rng, given)
    return row


@cache
def recogniser(template: str) -> re.Pattern[str]:
    """A pattern that matches exactly what `expand` can draw from the template, each word followed by one blank."""
    return re.compile(_pattern(template))


def _pattern(template: str) -> str:
    parts = []
    for part in template.split():
        name = part.strip("{}")
        options = "|".join(_pattern(option) for option in dict.fromkeys(RULES[name])) if name != part else ""
        parts.append(f"(?:{options})" if options else re.escape(part) + " ")
    return "".join(parts)


def matches(template: str, row: Sequence[str]) -> bool:
    """Whether the grammar can make this row of words from the template."""
    return recogniser(template).fullmatch("".join(word + " " for word in row)) is not None


def sentences(row: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The row cut after each full stop and question mark; the last piece may lack one."""
    start = 0
    for i, word in enumerate(row):
        if word in _SENTENCE_END or i == len(row) - 1:
            yield tuple(row[start : i + 1])
            start = i + 1


@cache
def read(sentence: tuple[str, ...]) -> Sentence | None:
    """The sentence as the grammar understands it, or None where no rule makes it.

    >>> read(("maybe", "it", "is", "not", "red", ".")).claims
    (Claim(entity='it', value='red', affirmed=False),)
    >>> read(("red", "is", "fox", "."))
    """
    for kind in REPLY_KINDS:
        if matches(f"{{{kind}}}", sentence):
            return Sentence(kind, sentence, _claims(sentence) if kind == "fact" else (), _verdict(kind, sentence))
    return None


def _verdict(kind: str, sentence: tuple[str, ...]) -> bool | None:
    if kind in ("agree", "deny"):
        return kind == "agree"
    if kind == "fact" and sentence[0] in ("yes", "no", "sorry"):
        return sentence[0] == "yes"
    return None


def _claims(sentence: tuple[str, ...]) -> tuple[Claim, ...]:
    entity = next((word for word in sentence if word in FACTS), "it")
    affirmed = not _NEGATIONS.intersection(sentence)
    return tuple(Claim(entity, word, affirmed) for word in sentence if word in ATTRIBUTE_OF)
