"""The special tokens and the chat template of tokenizers that Baton trains itself.

A conversation is rendered as

    <|bos|><|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>Hi!<|end|>

Every turn begins with the token of its role and ends with `<|end|>`, with nothing in between: neither spaces nor line
breaks. So special tokens are the only borders, text beside them is always cut into the same tokens, and the ids of a
rendered conversation are those of its parts put one after another. A template that puts words or line breaks around a
turn loses that, and with it the promise that training and generation see the same ids.

Documents of pretraining end with `<|eos|>`. Generation stops at `<|end|>` or `<|eos|>`.
"""

from typing import Final

BOS: Final = "<|bos|>"
EOS: Final = "<|eos|>"
PAD: Final = "<|pad|>"
END: Final = "<|end|>"

ROLES: Final = ("system", "user", "assistant", "tool")
"""Each has the special token `<|role|>`."""

STOP_TOKENS: Final = (END, EOS)
"""Generation stops at any of these; the first is the one that ends an answer."""

SPECIAL_TOKENS: Final = (
    BOS,
    EOS,
    PAD,
    *(f"<|{role}|>" for role in ROLES),
    END,
    *(f"<|reserved_{n}|>" for n in range(8)),
)
"""In the order of their ids, from 0. The reserved ones give later training new markers without resizing a model."""

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
"""Saved with every tokenizer that Baton trains, so that any program renders a conversation as Baton does."""
