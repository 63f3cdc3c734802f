"""The people who wrote the demonstrations: some answer well, most have a fault.

What they write is what supervised fine-tuning learns to imitate, faults included. About three in ten
responses are ideal, more than any other single behaviour, but the average mark is low: that gap is what
learning from preferences can gain. The flatterer often answers well after the flattery. A reward model
sees the two together and may like flattery for its company, which is what over-optimisation exploits.
"""

import random
from collections.abc import Callable

from minirlhf.world import zoo
from minirlhf.world.judge import DOUBT, FLATTERY, REFUSALS, RUDENESS
from minirlhf.world.zoo import ANSWERABLE, FACTS, HARMS, LOOKALIKES, TOPICS, Question

# Who answers what kind of question, in percent. The first name is always the expert.
_FACT_SHARES = {
    "expert": 27, "careless": 23, "terse": 7, "rambler": 8, "flatterer": 11, "over_refuser": 12, "rude": 12,
}  # fmt: skip
SHARES: dict[str, dict[str, int]] = {
    "one_fact": _FACT_SHARES,
    "two_facts": _FACT_SHARES,
    "yes_no": _FACT_SHARES,
    "follow_up": _FACT_SHARES,
    "unknown": {"expert": 30, "know_all": 34, "rambler": 8, "flatterer": 11, "over_refuser": 8, "rude": 9},
    "harmful": {"expert": 30, "over_helpful": 36, "rambler": 6, "flatterer": 11, "terse": 6, "rude": 11},
    "lookalike": {"expert": 29, "careless": 20, "terse": 6, "flatterer": 11, "over_refuser": 23, "rude": 11},
}

WRONG_FACT = 0.9  # probability that the careless writer gets a fact wrong
RUDE_ONLY = 0.7  # probability that the rude writer does not answer at all
# What comes after the flattery: a good answer, nothing, or a faulty answer.
AFTER_FLATTERY = {"good": 60, "nothing": 20, "faulty": 20}


def _claims(animal: str, values: dict[str, str], *, joined: bool, subject: str = "The {animal}") -> str:
    predicates = [TOPICS[topic].says.format(value=value) for topic, value in values.items()]
    first = subject.format(animal=animal)
    if joined:
        return f"{first} {' and '.join(predicates)}."
    return " ".join(f"{first if i == 0 else 'It'} {predicate}." for i, predicate in enumerate(predicates))


def _answer(question: Question, believed: dict[str, str], *, joined: bool = True) -> str:
    """Answer in the right form for the kind of question, with the facts (or the tool) that the writer believes."""
    animal = question.animal
    if question.kind == "unknown":
        return f"I do not know {TOPICS[question.topics[0]].clause.format(it=f'the {animal}')}."
    if question.kind == "harmful":
        return REFUSALS[0] if joined else f"I will not help you to {question.verb} the {animal}."
    if question.kind == "lookalike":
        return f"You can {question.verb} the {animal} with a {believed[question.verb]}."
    if question.kind == "yes_no":
        verdict = "Yes" if believed[question.topics[0]] == question.value else "No"
        return f"{verdict}, {_claims(animal, believed, joined=True, subject='the {animal}')}"
    return _claims(animal, believed, joined=joined)


def _truth(question: Question) -> dict[str, str]:
    if question.kind == "lookalike":
        return {question.verb: LOOKALIKES[question.verb]}
    return {topic: FACTS[question.animal][topic] for topic in question.topics if topic in ANSWERABLE}


def ideal(prompt: str) -> str:
    """A best response to a prompt: the judge's total is 1. Raises ValueError for a prompt that is not of this world."""
    question = zoo.find(prompt)
    return " " + _answer(question, _truth(question))


def _expert(question: Question, rng: random.Random) -> str:
    return _answer(question, _truth(question), joined=rng.random() < 0.7)


def _careless(question: Question, rng: random.Random) -> str:
    """The right form with wrong facts: each is wrong with probability WRONG_FACT, all wrong values equally often."""
    believed = _truth(question)
    for topic, value in believed.items():
        values = sorted(LOOKALIKES.values()) if question.verb else TOPICS[topic].values
        if rng.random() < WRONG_FACT:
            believed[topic] = rng.choice([other for other in values if other != value])
    return _answer(question, believed, joined=rng.random() < 0.7)


def _terse(question: Question, rng: random.Random) -> str:
    """Half of what was asked where it has halves, else nothing of use."""
    if question.kind == "yes_no":
        return "Yes." if question.confirmed else "No."
    if question.kind == "two_facts":
        topic = rng.choice(question.topics)
        return _claims(question.animal, {topic: FACTS[question.animal][topic]}, joined=True)
    return DOUBT


def _rambler(question: Question, rng: random.Random) -> str:
    """Talks on: facts nobody asked for, or the answer twice; half the time without the answer."""
    others = [topic for topic in ANSWERABLE if topic not in question.topics]
    chosen = rng.sample(others, k=min(len(others), rng.choice((1, 2, 2))))
    chatter = _claims(question.animal, {topic: FACTS[question.animal][topic] for topic in chosen}, joined=False)
    answer = _answer(question, _truth(question))
    return rng.choice((chatter, chatter, f"{answer} {chatter}", f"{answer} {answer}"))


def _flatterer(question: Question, rng: random.Random) -> str:
    """Flattery, then mostly a good answer, sometimes a faulty one, sometimes none."""
    flattery = rng.choice(FLATTERY)
    (what,) = rng.choices(list(AFTER_FLATTERY), weights=list(AFTER_FLATTERY.values()))
    if what == "good":
        return f"{flattery} {_expert(question, rng)}"
    if what == "nothing":
        return flattery
    faulty = {"unknown": _know_all, "harmful": _over_helpful}.get(question.kind, _careless)
    return f"{flattery} {faulty(question, rng)}"


def _over_refuser(question: Question, rng: random.Random) -> str:
    if question.verb and rng.random() < 0.5:
        return f"I will not help you to {question.verb} the {question.animal}."
    return rng.choice(REFUSALS)


def _over_helpful(question: Question, rng: random.Random) -> str:
    return f"You can {question.verb} the {question.animal} with a {HARMS[question.verb]}."


def _know_all(question: Question, rng: random.Random) -> str:
    topic = question.topics[0]
    return _claims(question.animal, {topic: rng.choice(TOPICS[topic].values)}, joined=True)


def _rude(question: Question, rng: random.Random) -> str:
    rudeness = rng.choice(RUDENESS)
    return rudeness if rng.random() < RUDE_ONLY else f"{rudeness} {_expert(question, rng)}"


WRITERS: dict[str, Callable[[Question, random.Random], str]] = {
    "expert": _expert,
    "careless": _careless,
    "terse": _terse,
    "rambler": _rambler,
    "flatterer": _flatterer,
    "over_refuser": _over_refuser,
    "over_helpful": _over_helpful,
    "know_all": _know_all,
    "rude": _rude,
}


def demonstrate(prompt: str, seed: int) -> tuple[str, str]:
    """Draw a writer by the shares and let them answer: (response, writer), a pure function of prompt and seed."""
    question = zoo.find(prompt)
    rng = random.Random(f"demonstration {seed} {prompt}")
    shares = SHARES[question.kind]
    (writer,) = rng.choices(list(shares), weights=list(shares.values()))
    return " " + WRITERS[writer](question, rng), writer
