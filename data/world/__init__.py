"""The embedded world: a seeded procedural generator of data for the whole pipeline, without files or downloads.

`documents`, `chats`, `preferences` and `prompts` take a `WorldSource` and yield records; `correct` and `gold` grade a
completion by a prompt's `columns`. Standard library only. lexicon.py holds the words, facts.py the facts, tasks.py the
instruction families and the splits, style.py the styles, documents.py the texts, grading.py the graders.
"""

from data.world.generate import chats, documents, preferences, prompts
from data.world.grading import correct, gold
from data.world.tasks import FAMILIES

__all__ = ["FAMILIES", "chats", "correct", "documents", "gold", "preferences", "prompts"]
