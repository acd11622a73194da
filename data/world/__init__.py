"""The embedded world: a seeded procedural generator of all that the pipeline needs, with no file and no download.

`documents`, `chats`, `preferences` and `prompts` take a `WorldSource` and yield records; `correct` and `gold` judge a
completion by a prompt's `columns`. Pure standard library. lexicon.py has the words, facts.py what is true, tasks.py the
instruction families and the splits, style.py the manners, documents.py the texts, grading.py the judges.
"""

from data.world.generate import chats, documents, preferences, prompts
from data.world.grading import correct, gold
from data.world.tasks import FAMILIES

__all__ = ["FAMILIES", "chats", "correct", "documents", "gold", "preferences", "prompts"]
