"""The special tokens and the chat template of tokenizers that Baton trains.

A conversation is rendered as

    <|bos|><|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>Hi!<|end|>

Every turn begins with the token of its role and ends with `<|end|>`, without added spaces or line breaks. So special
tokens are the only borders, the text between them is always tokenised in the same way, and the ids of a rendered
conversation are the concatenated ids of its parts. A template that puts words or line breaks around a turn loses this
property, and then training and generation may see different ids.

Documents of pretraining end with `<|eos|>`. Generation stops at `<|end|>` or `<|eos|>`.
"""

from typing import Final

BOS: Final = "<|bos|>"
EOS: Final = "<|eos|>"
PAD: Final = "<|pad|>"
END: Final = "<|end|>"

ROLES: Final = ("system", "user", "assistant", "tool")
"""The roles; each has the special token `<|role|>`."""

STOP_TOKENS: Final = (END, EOS)
"""Generation stops at any of these; the first one ends an answer."""

SPECIAL_TOKENS: Final = (
    BOS,
    EOS,
    PAD,
    *(f"<|{role}|>" for role in ROLES),
    END,
    *(f"<|reserved_{n}|>" for n in range(8)),
)
"""In the order of their ids, from 0. Reserved tokens allow new markers later without resizing the model."""

CHAT_TEMPLATE: Final = (
    "{{- '<|bos|>' -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}"
    "{{- raise_exception('unknown role ' + message['role'] + ' (known: system, user, assistant, tool)') -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
"""Saved with every tokenizer that Baton trains, so that other programs render a conversation as Baton does."""
