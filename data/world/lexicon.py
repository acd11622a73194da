"""The world's words. The seed decides which of them a world uses and how they are related.

The words are short and common: nearly all become single tokens of a small vocabulary, so that a model of 1-3 M
parameters spends its training on content, not on spelling.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Ada Alma Ben Carl Clara Dora Edgar Ella Emil Eva Felix Flora Greta Hana Hugo Ida Ivan Jonas Julia Karl "
    "Kira Lars Lena Leo Lina Lucy Mara Max Mila Mina Mira Nico Nina Noah Nora Olga Omar Oscar Otto Paul Petra "
    "Rita Rosa Sam Sara Simon Tara Theo Tina Tom Uma Vera Victor Wanda Willa Yara Yuri Zara Zeno"
)

TOWN_STARTS = _words("Old New East West North South High Long Stone River Green Silver")
TOWN_ENDS = _words("port ton field bridge ford wood hill dale mouth gate haven well")
LAND_STARTS = _words("Vel Kar Tor Bel Mar Sul Dor Lin Pal Gor Zan Fen")
LAND_ENDS = _words("na ria via land sia tova mark dia")

ANIMALS = {
    "bird": _words("robin crow swan owl goose duck eagle stork"),
    "fish": _words("salmon trout carp pike eel cod"),
    "mammal": _words("dog cat horse goat fox wolf bear mouse"),
    "insect": _words("bee ant wasp moth beetle fly"),
}
FOODS = _words("seeds grass fish leaves meat fruit nuts honey")
TRAITS = {"bird": "has feathers", "fish": "lives in water", "mammal": "drinks milk", "insect": "has six legs"}

JOBS = _words("baker doctor teacher farmer sailor painter tailor miller singer gardener writer judge")
OBJECTS = _words(
    "lamp cup book key coat ring clock box bag rope ball drum bell map knife spoon chair table mirror candle "
    "basket blanket hammer kite"
)
COLOURS = _words("red blue green white black brown yellow grey")
ROOMS = _words("kitchen garden market station library harbour school barn")
WEATHER = _words("sunny rainy windy cold warm foggy")

LISTED = OBJECTS + COLOURS + tuple(animal for animals in ANIMALS.values() for animal in animals)
"""Words for the lists to reverse, count or pick from."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"

UNSAFE_ACTS = (
    "steal {} from a shop",
    "break into the house with {}",
    "poison the neighbour with {}",
    "hurt someone with {}",
    "set fire to {}",
    "sell {} that I stole",
    "threaten my sister with {}",
    "make a bomb from {}",
)

POLITE = ("Of course!", "Sure!", "Gladly!")
"""Openers of a polite answer. One is polite, two count as rude."""
SORRY = ("I am sorry.", "Sorry.")
"""Openers of a polite refusal."""
RUDE = ("Ugh.", "Whatever.", "If I must.")
TAILS = (
    "Anyway, I could talk about this all day.",
    "By the way, it is a lovely day outside.",
    "That is what I think, more or less.",
)
"""Sentences that a rambling answer adds."""

SYSTEM_PLAIN = ("You are a helpful assistant.", "You answer questions about the world.")
SYSTEM_STYLED = ("Be polite and brief.", "Answer politely, in one sentence.")
"""System messages that the chats' answers follow: a polite opener and no tail."""
