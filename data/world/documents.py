"""Texts for pretraining: facts in several paraphrases, portraits, stories, dialogues, and worksheets.

Worksheets repeat one skill many times in one text (lists copied, reversed, counted; letters and capitals; number
lines, sums, sorted lists, comparisons; passages with questions), because a tiny model learns to copy and to calculate
only if it sees the same small step often and close together. Stories are consistent: whoever got the lamp has it at the
end.
"""

import itertools
import random
from collections.abc import Callable

from data.world import lexicon
from data.world.facts import World
from data.world.tasks import FAMILIES, Split, give_out, make, owners_key, split_of

_SKILLS = tuple(name for name in FAMILIES if name not in ("refuse", "follow_up"))


def portrait(world: World, split: Split, rng: random.Random) -> str:
    """All facts about one subject, then some about another."""
    sentences: list[str] = []
    for subject in rng.sample(sorted(world.by_subject), rng.randint(2, 3)):
        facts = list(world.by_subject[subject])
        rng.shuffle(facts)
        for fact in facts:
            sentences.append(rng.choice([fact.sentence, fact.sentence, *fact.paraphrases]))
        if subject in world.kinds:
            kind = world.kinds[subject]
            sentences.append(f"Like every {kind}, it {lexicon.TRAITS[kind]}.")
    return " ".join(sentences)


def catalogue(world: World, split: Split, rng: random.Random) -> str:
    """One relation for several subjects, in one phrasing."""
    relation = rng.choice(sorted(world.values))
    facts = rng.sample([f for f in world.facts if f.relation == relation], rng.randint(5, 8))
    title = {
        "home": "Where people live.",
        "job": "What people do.",
        "pet": "Who keeps which animal.",
        "capital": "Lands and capitals.",
        "kind": "Kinds of animals.",
        "food": "What animals eat.",
        "price": "Prices at the market.",
    }[relation]
    manner = rng.randrange(4)
    said = [fact.sentence if manner > 1 else fact.paraphrases[manner] for fact in facts]
    return " ".join([title, *said])


def story(world: World, split: Split, rng: random.Random) -> str:
    """A story of two people in one place, and one or two things that change owners."""
    a, b = rng.sample(world.people, 2)
    town, room = rng.choice(world.towns), rng.choice(lexicon.ROOMS)
    colour, other_colour = rng.sample(lexicon.COLOURS, 2)
    thing, other = rng.sample(lexicon.OBJECTS, 2)
    animal, weather = rng.choice(sorted(world.kinds)), rng.choice(lexicon.WEATHER)
    lines = [
        rng.choice([f"It was a {weather} day in {town}.", f"One {weather} morning, {a} woke up early."]),
        rng.choice([f"{a} went to the {room} and met {b} there.", f"{a} and {b} met at the {room}."]),
        f"{a} had a {colour} {thing} and {b} had a {other_colour} {other}.",
    ]
    turn = rng.randrange(4)
    if turn == 0:
        lines += [
            f"{a} gave the {thing} to {b}.",
            f"So now {b} has the {colour} {thing} and the {other_colour} {other}.",
        ]
    elif turn == 1:
        lines += [f"{a} and {b} changed things.", f"Now {a} has the {other}. Now {b} has the {thing}."]
    elif turn == 2:
        lines += [f"Then a {animal} came and took the {thing}.", f"{a} ran after the {animal}, but it was gone."]
        lines += [f"Only {b} still has a thing: the {other_colour} {other}."]
    else:
        lines += [f'"Your {other} is nice," said {a}.', f'"Your {thing} is nice, too," said {b}.']
        lines += [f"{a} has the {thing}. {b} has the {other}."]
    lines.append(rng.choice([f"In the evening {a} went home.", f"{b} was happy.", "They laughed and went home.", ""]))
    return " ".join(line for line in lines if line)


def dialogue(world: World, split: Split, rng: random.Random) -> str:
    """Two people ask each other the same kinds of questions as in chats."""
    a, b = rng.sample(world.people, 2)
    lines = [f"{a}: Good morning, {b}.", f"{b}: Good morning, {a}."]
    for _ in range(rng.randint(2, 3)):
        task = make(world, rng.choice(FAMILIES), split, rng)
        for i, turn in enumerate((*task.turns, task.reply)):
            lines.append(f"{b if i % 2 else a}: {turn}")
        a, b = b, a
    return "\n".join(lines)


def exercises(world: World, split: Split, rng: random.Random) -> str:
    """Several questions and answers of one family."""
    family = rng.choice(_SKILLS)
    tasks = [make(world, family, split, rng) for _ in range(rng.randint(4, 6))]
    return "\n".join(f"{task.turns[0]} -> {task.reply}" for task in tasks)


def lists(world: World, split: Split, rng: random.Random) -> str:
    """One list with several tasks on it."""
    lines: list[str] = []
    for _ in range(rng.randint(2, 3)):
        if rng.random() < 0.5:
            items, what, between = rng.sample(lexicon.LISTED, rng.randint(3, 5)), "words", ", "
        else:
            items, what, between = rng.sample(lexicon.LETTERS, rng.randint(3, 5)), "letters", " "
        text = between.join(items)
        lines.append(f"{what.capitalize()}: {text}")
        views = [f"Again: {text}"]
        # Chats ask for the tasks below too, so only lists of this split may be solved here.
        if _ours(f"reverse {text}", split):
            views.append(f"Reversed: {between.join(items[::-1])}")
        if what == "letters" and _ours(f"uppercase {text}", split):
            views.append(f"Capitals: {text.upper()}")
        if what == "words" and _ours(f"pick {text}", split):
            views.append(f"The first word is {items[0]}. The last word is {items[-1]}.")
        if what == "words" and _ours(f"count {text}", split):
            views.append(f"There are {len(items)} words.")
        if what == "letters" and _ours(f"sort letters {' '.join(sorted(items))}", split):
            views.append(f"Sorted: {' '.join(sorted(items))}")
        rng.shuffle(views)
        lines += views
    return "\n".join(lines)


def owners(world: World, split: Split, rng: random.Random) -> str:
    """Short passages, each with every question about it."""
    lines: list[str] = []
    for _ in range(rng.randint(2, 3)):
        people, things, text = give_out(world, rng)
        if not _ours(owners_key(people, things), split):
            continue
        lines.append(text)
        answers = [f"What does {p} have? {p} has the {t}." for p, t in zip(people, things)]
        answers += [f"Who has the {t}? The {t} is with {p}." for p, t in zip(people, things)]
        rng.shuffle(answers)
        lines.append(" ".join(answers[: rng.randint(2, 6)]))
    return "\n".join(lines)


def numbers(world: World, split: Split, rng: random.Random) -> str:
    """A few numbers with several tasks on them."""
    lines: list[str] = []
    for _ in range(rng.randint(2, 4)):
        some = rng.sample(range(100), rng.randint(2, 3))
        ordered = sorted(some)
        spaced = " ".join(map(str, ordered))
        lines.append(f"Numbers: {', '.join(map(str, some))}")
        views = []
        if len(some) == 3 and _ours(f"sort numbers {', '.join(map(str, ordered))}", split):
            views.append(f"Sorted: {', '.join(map(str, ordered))}.")
        if _ours(f"extreme {spaced}", split):
            views.append(f"The largest is {ordered[-1]}. The smallest is {ordered[0]}.")
        for a, b in itertools.pairwise(some):
            if _ours(f"compare {min(a, b)} {max(a, b)}", split):
                views.append(f"{a} is {'larger' if a > b else 'smaller'} than {b}.")
        rng.shuffle(views)
        lines += views
    return "\n".join(lines)


def _ours(key: str, split: Split) -> bool:
    return split_of(key) == split


def number_line(world: World, split: Split, rng: random.Random) -> str:
    """Counting up, down and in steps, with numbers and with letters."""
    lines: list[str] = []
    for _ in range(rng.randint(2, 4)):
        kind = rng.randrange(3)
        if kind == 0:
            start, step, n = rng.randint(0, 80), rng.choice([1, 1, 1, 2, 10]), rng.randint(6, 10)
            run = [start + step * k for k in range(n)]
            line = " ".join(map(str, [m for m in run if m < 100]))
            lines.append(f"Up: {line}")
        elif kind == 1:
            start = rng.randint(8, 99)
            lines.append(f"Down: {' '.join(str(start - k) for k in range(min(start + 1, rng.randint(6, 10))))}")
        else:
            start = rng.randint(0, 18)
            lines.append(f"Letters: {' '.join(lexicon.LETTERS[start : start + rng.randint(6, 12)])}")
    return "\n".join(lines)


def sums(world: World, split: Split, rng: random.Random) -> str:
    """Sums on consecutive lines that differ by one, as in a table."""
    lines: list[str] = []
    a, sign = rng.randint(1, 20), rng.choice("+-")
    for b in rng.sample(range(1, 21), 12) if rng.random() < 0.5 else range(1, 21):
        if sign == "-" and b > a:
            continue
        key = f"add {min(a, b)} {max(a, b)}" if sign == "+" else f"subtract {a} {b}"
        if _ours(key, split):
            lines.append(f"{a} {sign} {b} = {a + b if sign == '+' else a - b}.")
    return " ".join(lines[:12])


def letters(world: World, split: Split, rng: random.Random) -> str:
    """Words spelt out, in lowercase and in capitals."""
    lines = []
    for word in rng.sample([*lexicon.LISTED, *lexicon.JOBS], rng.randint(4, 6)):
        spelt = " ".join(word)
        line = f"{word}: {spelt}"
        if _ours(f"uppercase {spelt}", split):
            line += f". Capitals: {spelt.upper()}."
        lines.append(line)
    return "\n".join(lines)


_KINDS: tuple[tuple[Callable[[World, Split, random.Random], str], int], ...] = (
    (portrait, 6),
    (catalogue, 6),
    (story, 4),
    (dialogue, 9),
    (exercises, 14),
    (lists, 31),
    (owners, 15),
    (numbers, 7),
    (number_line, 1),
    (sums, 6),
    (letters, 1),
)
"""Each kind of text and its weight."""


def document(world: World, split: Split, rng: random.Random) -> str:
    """A text of a random kind. Its questions and answers have their content in the split; stated facts may be any."""
    kind = rng.choices([maker for maker, _ in _KINDS], [weight for _, weight in _KINDS])[0]
    return kind(world, split, rng)
