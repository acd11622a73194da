"""A world: its people, lands, animals and things, and the facts about them, all determined by one seed.

Randomness is keyed and never a stream: `keyed(seed, ...)` makes one item's generator from the SHA-256 of its key, so
item number i is the same, however many items are generated and in any order.
"""

import hashlib
import random
from dataclasses import dataclass
from functools import lru_cache

from data.world import lexicon


def keyed(*key: int | str) -> random.Random:
    """A random generator that depends only on the key."""
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


@dataclass(frozen=True, slots=True)
class Fact:
    """`lead` + `value` + "." is the sentence that states it, and also the answer to each of `questions`."""

    relation: str
    subject: str
    value: str
    lead: str
    paraphrases: tuple[str, ...]
    questions: tuple[str, ...]

    @property
    def sentence(self) -> str:
        return f"{self.lead}{self.value}."


@dataclass(frozen=True, slots=True)
class World:
    """The data that generators draw from. `values[relation]` holds all values of a relation, for wrong answers."""

    seed: int
    people: tuple[str, ...]
    towns: tuple[str, ...]
    lands: tuple[str, ...]
    kinds: dict[str, str]
    facts: tuple[Fact, ...]
    by_subject: dict[str, tuple[Fact, ...]]
    values: dict[str, tuple[str, ...]]


def article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _fact(relation: str, subject: str, value: str) -> Fact:
    s, v = subject, value
    if relation == "home":
        lead, others = f"{s} lives in ", (f"The home of {s} is in {v}.", f"{s} has a house in {v}.")
        asked = (f"Where does {s} live?", f"In which town does {s} live?", f"Tell me where {s} lives.")
    elif relation == "job":
        lead, others = f"{s} works as ", (f"{s} is {v} by trade.", f"The work of {s} is that of {v}.")
        asked = (f"What is the job of {s}?", f"What does {s} work as?", f"Tell me the job of {s}.")
    elif relation == "pet":
        lead, others = f"{s} keeps ", (f"The pet of {s} is {v}.", f"{s} has {v} at home.")
        asked = (f"Which pet does {s} keep?", f"What animal does {s} keep?", f"Tell me the pet of {s}.")
    elif relation == "capital":
        lead, others = f"The capital of {s} is ", (f"{v} is the capital of {s}.", f"The king of {s} lives in {v}.")
        asked = (f"What is the capital of {s}?", f"Which town is the capital of {s}?", f"Name the capital of {s}.")
    elif relation == "kind":
        lead, others = f"The {s} is ", (f"We call the {s} {v}.", f"Every {s} is {v}.")
        asked = (f"What kind of animal is the {s}?", f"What is the {s}?", f"Tell me what the {s} is.")
    elif relation == "food":
        lead, others = f"The {s} eats ", (f"The food of the {s} is {v}.", f"Give {v} to the {s}.")
        asked = (f"What does the {s} eat?", f"What is the food of the {s}?", f"Tell me what the {s} eats.")
    else:
        assert relation == "price", relation
        lead, others = f"The {s} costs ", (f"The price of the {s} is {v}.", f"For {v} you can buy the {s}.")
        asked = (f"What does the {s} cost?", f"What is the price of the {s}?", f"Tell me the price of the {s}.")
    return Fact(relation, subject, value, lead, others, asked)


@lru_cache(maxsize=8)
def world(seed: int) -> World:
    """The world of this seed: about 190 facts in seven relations."""
    rng = keyed("world", seed)
    people = tuple(sorted(rng.sample(lexicon.NAMES, 32)))
    towns = tuple(a + b for a, b in zip(rng.sample(lexicon.TOWN_STARTS, 12), rng.sample(lexicon.TOWN_ENDS, 12)))
    lands = tuple(a + rng.choice(lexicon.LAND_ENDS) for a in rng.sample(lexicon.LAND_STARTS, 12))
    kinds = {animal: kind for kind, animals in lexicon.ANIMALS.items() for animal in animals}
    pets = [animal for kind in ("bird", "mammal") for animal in lexicon.ANIMALS[kind]]
    facts: list[Fact] = []
    for person in people:
        facts.append(_fact("home", person, rng.choice(towns)))
        facts.append(_fact("job", person, article(rng.choice(lexicon.JOBS))))
        facts.append(_fact("pet", person, article(rng.choice(pets))))
    for land, capital in zip(lands, rng.sample(towns, 12)):
        facts.append(_fact("capital", land, capital))
    for animal, kind in kinds.items():
        facts.append(_fact("kind", animal, article(kind)))
        facts.append(_fact("food", animal, rng.choice(lexicon.FOODS)))
    for thing in lexicon.OBJECTS:
        facts.append(_fact("price", thing, f"{rng.randint(2, 29)} coins"))
    by_subject: dict[str, tuple[Fact, ...]] = {}
    values: dict[str, tuple[str, ...]] = {}
    for fact in facts:
        by_subject[fact.subject] = (*by_subject.get(fact.subject, ()), fact)
        values[fact.relation] = tuple(sorted({*values.get(fact.relation, ()), fact.value}))
    return World(seed, people, towns, lands, kinds, tuple(facts), by_subject, values)
