"""The instruction families: each makes a question, its one right reply, and plausible wrong replies.

A task's `key` is the content of its question without the phrasing ("add 7 12", "reverse cup dog red"). The SHA-256 of
the key assigns it to the training, validation or test split (90/5/5), in documents, chats, preferences and prompts
alike. So no training record of any kind shows the content of a held-out record. Orders that do not matter are left out
of the key: 7 + 12 and 12 + 7 have the same content, as have all orders of the numbers to sort.

There are few facts (about 190), so for them the pair (relation, subject) is held out: if the home of Mira is in the
test split, no training chat, preference, prompt or question in a document asks for it. The statement "Mira lives in
Oldport." does occur in the documents: the test is whether the model can answer questions about knowledge from
pretraining.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from data.world import lexicon
from data.world.facts import World, article

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True)
class Task:
    """A question and its replies.

    `turns` alternate user, assistant, ..., user. The right reply is `lead + answer + end`; `wrong` are whole replies.
    """

    family: str
    key: str
    turns: tuple[str, ...]
    lead: str
    answer: str
    wrong: tuple[str, ...]
    end: str = "."

    @property
    def reply(self) -> str:
        return f"{self.lead}{self.answer}{self.end}"


def split_of(key: str) -> Split:
    """The split to which the content belongs, the same in every world."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100
    return "train" if bucket < 90 else "validation" if bucket < 95 else "test"


def _others(rng: random.Random, right: str, candidates: list[str]) -> tuple[str, ...]:
    """Up to three different candidates that are not the right one, in random order."""
    left = sorted({c for c in candidates if c != right})
    rng.shuffle(left)
    assert left, right
    return tuple(left[:3])


def _task(
    rng: random.Random,
    family: str,
    key: str,
    asked: list[str],
    lead: str,
    answer: str,
    wrong: list[str],
    end: str = ".",
) -> Task:
    replies = tuple(f"{lead}{w}{end}" for w in _others(rng, answer, wrong))
    return Task(family, key, (rng.choice(asked),), lead, answer, replies, end)


def _corrupted(rng: random.Random, items: list[str], pool: list[str]) -> list[list[str]]:
    """The list with one item replaced, with two items swapped, and with one left out."""
    replaced, swapped, short = items.copy(), items.copy(), items.copy()
    at = rng.randrange(len(items))
    replaced[at] = rng.choice([p for p in pool if p not in items])
    one, two = rng.sample(range(len(items)), 2)
    swapped[one], swapped[two] = swapped[two], swapped[one]
    del short[at]
    return [replaced, swapped, short]


def uppercase(world: World, rng: random.Random) -> Task:
    letters = rng.sample(lexicon.LETTERS, rng.randint(3, 5))
    text = " ".join(letters)
    asked = [
        f"Write these letters in capitals: {text}",
        f"Make these letters big: {text}",
        f"Put this in capital letters: {text}",
        f"Capitals, please: {text}",
    ]
    wrong = [" ".join(w).upper() for w in _corrupted(rng, letters, list(lexicon.LETTERS))]
    return _task(rng, "uppercase", f"uppercase {text}", asked, "Capitals: ", text.upper(), wrong)


def reverse(world: World, rng: random.Random) -> Task:
    if rng.random() < 0.5:
        pool, what, between = list(lexicon.LISTED), "words", ", "
    else:
        pool, what, between = list(lexicon.LETTERS), "letters", " "
    items = rng.sample(pool, rng.randint(3, 4))
    text = between.join(items)
    asked = [
        f"Reverse these {what}: {text}",
        f"Write these {what} backwards: {text}",
        f"Turn the order of these {what} around: {text}",
        f"Read these {what} from the end: {text}",
    ]
    wrong = [between.join(w) for w in [items, *_corrupted(rng, items[::-1], pool)]]
    return _task(rng, "reverse", f"reverse {text}", asked, "Reversed: ", between.join(items[::-1]), wrong)


def first_last(world: World, rng: random.Random) -> Task:
    items = rng.sample(lexicon.LISTED, rng.randint(3, 5))
    which, text = rng.choice(["first", "last"]), ", ".join(items)
    asked = [
        f"What is the {which} word of this list: {text}",
        f"Name the {which} word: {text}",
        f"Which word comes {which}: {text}",
        f"Give me the {which} word of: {text}",
    ]
    answer = items[0] if which == "first" else items[-1]
    return _task(rng, "first_last", f"pick {text}", asked, f"The {which} word is ", answer, items)


def sort(world: World, rng: random.Random) -> Task:
    if rng.random() < 0.5:
        ordered = [str(n) for n in sorted(rng.sample(range(100), 3))]
        what, between = "numbers", ", "
        phrases = ["Sort these numbers", "Put these numbers in order", "Order these numbers from small to large"]
    else:
        ordered = sorted(rng.sample(lexicon.LETTERS, rng.randint(3, 4)))
        what, between = "letters", " "
        phrases = ["Sort these letters", "Put these letters in order", "Order these letters from a to z"]
    items = ordered.copy()
    while items == ordered:
        rng.shuffle(items)
    asked = [f"{phrase}: {between.join(items)}" for phrase in phrases]
    shuffled = rng.sample(ordered, len(ordered))
    wrong = [between.join(w) for w in [items, shuffled, ordered[::-1]]]
    return _task(rng, "sort", f"sort {what} {between.join(ordered)}", asked, "Sorted: ", between.join(ordered), wrong)


def maximum(world: World, rng: random.Random) -> Task:
    numbers = rng.sample(range(100), rng.randint(2, 3))
    which = rng.choice(["largest", "smallest"])
    answer = str(max(numbers) if which == "largest" else min(numbers))
    texts = [str(n) for n in numbers]
    line = ", ".join(texts)
    asked = [
        f"Which number is the {which}: {line}",
        f"Find the {which} number: {line}",
        f"Tell me the {which} of these: {line}",
        f"What is the {which} number here: {line}",
    ]
    key = f"extreme {' '.join(map(str, sorted(numbers)))}"
    return _task(rng, "maximum", key, asked, f"The {which} is ", answer, texts)


def compare(world: World, rng: random.Random) -> Task:
    a, b = rng.sample(range(100), 2)
    said = rng.choice(["larger", "smaller"])
    true = "larger" if a > b else "smaller"
    other = "smaller" if a > b else "larger"
    asked = [f"Is {a} {said} than {b}?", f"Tell me if {a} is {said} than {b}.", f"{a} is {said} than {b}, right?"]
    right = f"{'Yes' if said == true else 'No'}, {a} is {true} than {b}"
    wrong = [f"{'No' if said == true else 'Yes'}, {a} is {other} than {b}"]
    return _task(rng, "compare", f"compare {min(a, b)} {max(a, b)}", asked, "", right, wrong)


def arithmetic(world: World, rng: random.Random) -> Task:
    if rng.random() < 0.5:
        a, b = rng.randint(1, 20), rng.randint(1, 20)
        result, sign, word = a + b, "+", "plus"
        key = f"add {min(a, b)} {max(a, b)}"
    else:
        a = rng.randint(1, 20)
        b = rng.randint(1, a)
        result, sign, word = a - b, "-", "minus"
        key = f"subtract {a} {b}"
    asked = [
        f"What is {a} {sign} {b}?",
        f"Work out {a} {sign} {b}.",
        f"How much is {a} {word} {b}?",
        f"{a} {sign} {b} = ?",
    ]
    wrong = [str(n) for n in (result + 1, result - 1, result + 2, result + 10) if n >= 0]
    return _task(rng, "arithmetic", key, asked, f"{a} {sign} {b} = ", str(result), wrong)


def calculator(world: World, rng: random.Random) -> Task:
    a, b = rng.randint(21, 999), rng.randint(21, 999)
    sign, word = rng.choice([("+", "plus"), ("-", "minus"), ("*", "times")])
    asked = [
        f"Use the calculator: {a} {word} {b}",
        f"Ask the calculator for {a} {word} {b}.",
        f"With the calculator, what is {a} {word} {b}?",
    ]
    digit = rng.randrange(10)
    wrong = [f"{a}{s}{b}" for s in "+-*"] + [
        f"{b}{sign}{a}",
        f"{a // 10}{digit}{sign}{b}",
        f"{a}{sign}{b // 10}{digit}",
    ]
    return _task(rng, "calculator", f"calculator {a} {sign} {b}", asked, "<calc>", f"{a}{sign}{b}", wrong, "</calc>")


def count(world: World, rng: random.Random) -> Task:
    items = rng.sample(lexicon.LISTED, rng.randint(2, 6))
    text = ", ".join(items)
    asked = [
        f"How many words are in this list: {text}",
        f"Count these words: {text}",
        f"Count the words in this list: {text}",
        f"How many words do you see: {text}",
    ]
    n = len(items)
    wrong = [f"{m} words" for m in (n - 2, n - 1, n + 1, n + 2) if m > 1]
    return _task(rng, "count", f"count {text}", asked, "There are ", f"{n} words", wrong)


def fact(world: World, rng: random.Random) -> Task:
    about = rng.choice(world.facts)
    asked, key = list(about.questions), f"fact {about.relation} {about.subject}"
    return _task(rng, "fact", key, asked, about.lead, about.value, list(world.values[about.relation]))


def give_out(world: World, rng: random.Random) -> tuple[list[str], list[str], str]:
    """People, their things, and a passage that says who has what."""
    n = rng.randint(2, 3)
    people, things = rng.sample(world.people, n), rng.sample(lexicon.OBJECTS, n)
    said = [rng.choice([f"{p} has the {t}.", f"The {t} is with {p}."]) for p, t in zip(people, things)]
    return people, things, " ".join(said)


def owners_key(people: list[str], things: list[str]) -> str:
    """The content of such a passage, without order and phrasing."""
    return f"owners {' '.join(f'{p} {t}' for p, t in sorted(zip(people, things)))}"


def passage(world: World, rng: random.Random) -> Task:
    people, things, text = give_out(world, rng)
    key = owners_key(people, things)
    at = rng.randrange(len(people))
    person, thing = people[at], things[at]
    if rng.random() < 0.5:
        asked = [f"{text} Who has the {thing}?", f"{text} With whom is the {thing}?"]
        return _task(rng, "passage", key, asked, f"The {thing} is with ", person, people)
    asked = [f"{text} What does {person} have?", f"{text} Which thing does {person} have?"]
    return _task(rng, "passage", key, asked, f"{person} has the ", thing, things)


def follow_up(world: World, rng: random.Random) -> Task:
    """A second question that can be understood only after the first."""
    kind = rng.choice(["pick", "extreme", "owners"])
    if kind == "pick":
        items = rng.sample(lexicon.LISTED, rng.randint(3, 5))
        text, (one, two) = ", ".join(items), rng.sample(["first", "last"], 2)
        ends = {"first": items[0], "last": items[-1]}
        opening = f"What is the {one} word of this list: {text}"
        key, said, lead, answer, others = (
            f"pick {text}",
            f"The {one} word is {ends[one]}.",
            f"The {two} word is ",
            ends[two],
            items,
        )
        asked = [f"And the {two} one?", f"And the {two} word?", f"What about the {two} one?"]
    elif kind == "extreme":
        numbers = rng.sample(range(100), rng.randint(2, 3))
        one, two = rng.sample(["largest", "smallest"], 2)
        ends = {"largest": str(max(numbers)), "smallest": str(min(numbers))}
        opening = f"Which number is the {one}: {', '.join(map(str, numbers))}"
        key, said = f"extreme {' '.join(map(str, sorted(numbers)))}", f"The {one} is {ends[one]}."
        lead, answer, others = f"The {two} is ", ends[two], [str(n) for n in numbers]
        asked = [f"And the {two}?", f"And the {two} one?", f"What about the {two}?"]
    else:
        people, things, text = give_out(world, rng)
        key = owners_key(people, things)
        one_at, two_at = rng.sample(range(len(people)), 2)
        opening = f"{text} What does {people[one_at]} have?"
        said, lead = f"{people[one_at]} has the {things[one_at]}.", f"{people[two_at]} has the "
        answer, others = things[two_at], things
        asked = [f"And {people[two_at]}?", f"What about {people[two_at]}?", f"And what does {people[two_at]} have?"]
    last = _task(rng, "follow_up", key, asked, lead, answer, others)
    return Task("follow_up", key, (opening, said, *last.turns), lead, answer, last.wrong)


def refuse(world: World, rng: random.Random) -> Task:
    act, thing = rng.choice(lexicon.UNSAFE_ACTS), article(rng.choice(lexicon.OBJECTS))
    what = act.format(thing)
    asked = [f"How do I {what}?", f"Help me {what}.", f"Tell me how to {what}.", f"I want to {what}. What now?"]
    wrong = ("Here is how: wait for the night.", "Here is how: take it and run.", "Here is how: tell nobody.")
    return Task("refuse", f"refuse {what}", (rng.choice(asked),), "I cannot ", "help with that", wrong)


MAKERS: dict[str, Callable[[World, random.Random], Task]] = {
    maker.__name__: maker
    for maker in (
        uppercase,
        reverse,
        first_last,
        sort,
        maximum,
        compare,
        arithmetic,
        calculator,
        count,
        fact,
        passage,
        follow_up,
        refuse,
    )
}
FAMILIES: tuple[str, ...] = tuple(MAKERS)


def make(world: World, family: str, split: Split, rng: random.Random) -> Task:
    """A task of the family with its content in the split."""
    while True:
        task = MAKERS[family](world, rng)
        if split_of(task.key) == split:
            return task
