"""What the nano model reads: stories to pre-train on, and demonstrations to instruct it. Standard library only.

The demonstrator is an honest, warm and rather careless speaker: it tells the truth about six times in ten, gives in to
a false opinion nearly as often as not, hedges, gushes and chats. That leaves the model room to become better than its
teacher (gold up) and room for each of the lesson's hacks: every one is in the language, none is the rule.
All shares below are probabilities of one choice of the demonstrator.
"""

from __future__ import annotations

from random import Random
from typing import Final

from tether.worlds.nano_grammar import ATTRIBUTES, ENTITIES, FACTS, JUNK, VALUES, expand
from tether.worlds.nano_prompts import OWN_STANCES, STATED, THIRD_PARTY_STANCES, Question, understand

MAX_REPLY_WORDS: Final = 21
"""With its EOS a reply has at most 22 tokens, so that the model, which cannot count, hardly ever needs more than 24."""

RIGHT_FACT: Final = 0.6
RIGHT_IN_STORIES: Final = 0.9
AGREES_WITH_TRUE: Final = 0.85
AGREES_WITH_FALSE: Final = 0.4
KEEPS_THE_NAME: Final = 0.5
JOINS_ANOTHER_FACT: Final = 0.2
HEDGES_A_FACT: Final = 0.15
DUCKS_THE_QUESTION: Final = 0.1
RIGHT_FEELING: Final = 0.7
GREETS: Final = 0.3
SAYS_GOODBYE: Final = 0.3
ADDS_A_HEDGE: Final = 0.1
GUSHES: Final = 0.1
REPEATS_ITSELF: Final = 0.04
DROPS_JUNK: Final = 0.01


def demonstrate(prompt: str, rng: Random) -> list[str]:
    """One reply of the demonstrator to a prompt of this world, as words, at most `MAX_REPLY_WORDS` of them."""
    question = understand(prompt)
    while True:
        row = [word for sentence in _plan(question, rng) for word in sentence]
        if rng.random() < DROPS_JUNK:
            row.insert(rng.randrange(len(row) + 1), rng.choice(JUNK))
        if len(row) <= MAX_REPLY_WORDS:
            return row


def card(rng: Random) -> list[str]:
    """The four facts of one animal in plain words and any order: the first thing that the model reads."""
    entity = rng.choice(ENTITIES)
    stated = [STATED[name].format(e=entity, v=value) for name, value in zip(ATTRIBUTES, FACTS[entity], strict=True)]
    return " ".join(rng.sample(stated, len(stated))).split()


def story(rng: Random) -> list[str]:
    """Three to six sentences about one animal, mostly true: a document to pre-train on."""
    entity = rng.choice(ENTITIES)
    kinds = ["fact"] * 4 + ["warm", "farewell", "hedge", "buzz_line", "agree", "deny", "advice", "sympathy", "cheer"]
    row = fact(rng, entity, rng.choice(ATTRIBUTES), RIGHT_IN_STORIES, named=True)
    for kind in rng.choices([*kinds, "flat"], k=rng.randint(2, 5)):
        if kind == "fact":
            row += fact(rng, entity, rng.choice(ATTRIBUTES), RIGHT_IN_STORIES)
        else:
            row += expand(f"{{{kind}}}", rng)
    return row


def hearsay(rng: Random) -> list[str]:
    """An opinion and what somebody says to it: teaches the model to take up what was said before."""
    entity, attribute = rng.choice(ENTITIES), rng.choice(ATTRIBUTES)
    stance, value = rng.choice(OWN_STANCES + THIRD_PARTY_STANCES), rng.choice(VALUES[attribute])
    line = STATED[attribute].format(e=entity, v=value)
    return f"{stance} {line}".split() + [
        w for s in _verdict(Question("opinion", entity, attribute, value), rng) for w in s
    ]


def fact(rng: Random, entity: str, attribute: str, right: float, lead: str = "", named: bool = False) -> list[str]:
    """A sentence that says what `attribute` of the animal is; true with probability `right`.

    `lead` names a rule of the grammar to begin with, by default a plain or a hedged lead; `named` forbids *it*.
    """
    opening = lead or ("hedged_lead" if rng.random() < HEDGES_A_FACT else "lead")
    subject = (
        rng.choice(("the {entity}", "the {adjective} {entity}")) if named or rng.random() < KEEPS_THE_NAME else "it"
    )
    row = expand(f"{{{opening}}} {subject}", rng, {"entity": entity}) + _claim(rng, entity, attribute, right)
    if rng.random() < JOINS_ANOTHER_FACT:
        other = rng.choice([name for name in ATTRIBUTES if name != attribute])
        row += ["and", *_claim(rng, entity, other, right)]
    return [*row, "."]


def _claim(rng: Random, entity: str, attribute: str, right: float) -> list[str]:
    truth = FACTS[entity][ATTRIBUTES.index(attribute)]
    value = truth if rng.random() < right else rng.choice(VALUES[attribute])
    return expand(f"{{{attribute}_claim}}", rng, {attribute: value})


def _plan(question: Question, rng: Random) -> list[list[str]]:
    plan = [expand("{warm}", rng)] if rng.random() < GREETS else []
    plan += _body(question, rng)
    if rng.random() < ADDS_A_HEDGE:
        plan.append(expand("{hedge}", rng))
    if rng.random() < GUSHES:
        plan.append(expand("{buzz_line}", rng))
    if rng.random() < REPEATS_ITSELF:
        plan.append(plan[-1])
    if rng.random() < SAYS_GOODBYE:
        plan.append(expand("{farewell}", rng))
    return plan


def _body(question: Question, rng: Random) -> list[list[str]]:
    if rng.random() < DUCKS_THE_QUESTION:
        return [expand("{flat}", rng)]
    if question.kind == "opinion":
        return _verdict(question, rng)
    if question.kind == "tell":
        chosen = rng.sample(ATTRIBUTES, rng.choice((1, 1, 2)))
        return [fact(rng, question.entity, name, RIGHT_FACT) for name in chosen]
    if question.kind == "mood":
        return _comfort(question, rng)
    return [fact(rng, question.entity, question.attribute, RIGHT_FACT)]


def _verdict(question: Question, rng: Random) -> list[list[str]]:
    """Agrees with or denies the stated opinion, by a verdict, a statement or both."""
    right = question.stated == question.truth
    agreeing = rng.random() < (AGREES_WITH_TRUE if right else AGREES_WITH_FALSE)
    lines = [expand("{agree}" if agreeing else "{deny}", rng)]
    yes_or_no = "yes ," if agreeing else rng.choice(("no ,", "sorry , no ,"))
    subject = "the {entity}" if rng.random() < KEEPS_THE_NAME else "it"
    about = {"entity": question.entity, question.attribute: question.stated}
    if agreeing:
        statement = expand(f"{yes_or_no} {subject} {{{question.attribute}_claim}} .", rng, about)
    elif rng.random() < KEEPS_THE_NAME:
        statement = expand(f"{yes_or_no} {subject} {{{question.attribute}_denial}} .", rng, about)
    else:
        corrected = (
            question.truth if not right and rng.random() < RIGHT_FACT else rng.choice(VALUES[question.attribute])
        )
        about[question.attribute] = corrected
        statement = expand(f"{yes_or_no} {subject} {{{question.attribute}_claim}} .", rng, about)
    return rng.choice(([*lines, statement], lines, [statement], [statement]))


def _comfort(question: Question, rng: Random) -> list[list[str]]:
    fitting = ("sympathy", "cheer") if question.sad else ("cheer", "sympathy")
    feeling = fitting[0] if rng.random() < RIGHT_FEELING else fitting[1]
    advice = [expand("{advice}", rng) for _ in range(rng.choice((0, 1, 1, 2)))]
    return rng.choice(([expand(f"{{{feeling}}}", rng), *advice], advice or [expand(f"{{{feeling}}}", rng)]))
