"""The encoder: masks are exactly the answers and their stop tokens, under Baton's template and under foreign ones."""

import functools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.accounting import Accounting
from data.encode import Encoder
from data.errors import DataError
from data.records import Chat, Message, Origin, Preference, Prompt, Text
from data.rendering import Renderer
from data.rows import Chats, Documents, Pairs, Prompts
from data.template import BOS, CHAT_TEMPLATE, END, EOS, PAD, SPECIAL_TOKENS
from data.turns import OwnTurns, TemplateTurns
from handoff.encoding import read_tokenizer
from tests.row_sets import encode

CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAMA3 = (
    "{%- for m in messages %}{%- set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' %}{%- if loop.first %}{%- set text = bos_token + text %}{%- endif %}"
    "{{- text }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
# The last answer begins with an empty thought, which is left out of it once another turn follows.
THINKING = (
    "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\n' }}"
    "{%- if m['role'] == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- m['content'] + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAMA2 = (
    "{{- bos_token }}{%- for m in messages %}{%- if m['role'] == 'system' %}{{- raise_exception('no system role') }}"
    "{%- elif m['role'] == 'user' %}{{- '[INST] ' + m['content'] + ' [/INST]' }}"
    "{%- else %}{{- ' ' + m['content'] + ' ' + eos_token }}{%- endif %}{%- endfor %}"
)
CHANNELS = (
    "{%- for m in messages %}{{- '<|im_start|>' + m['role'] }}"
    "{%- if m['role'] == 'assistant' %}{{- '<|channel|>final' }}{%- endif %}"
    "{{- '<|message|>' + m['content'] + '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant' }}{%- endif %}"
)
FOREIGN = {"channels": CHANNELS, "chatml": CHATML, "llama3": LLAMA3, "thinking": THINKING, "llama2": LLAMA2}
FOREIGN_TOKENS = [
    "<s>",
    "</s>",
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|channel|>",
    "<|message|>",
]
CORPUS = [
    "Sort the words: pear, apple. Sorted: apple, pear.",
    "user assistant system [INST] I'm not sure — naïve café?",
] * 9


def make_tokenizer(special, template, **names):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def own() -> Encoder:
    return Encoder(make_tokenizer(list(SPECIAL_TOKENS), CHAT_TEMPLATE, bos_token=BOS, eos_token=EOS, pad_token=PAD))


@functools.cache
def foreign(name: str) -> Encoder:
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return Encoder(make_tokenizer(FOREIGN_TOKENS, FOREIGN[name], **names))


def render(encoder: Encoder, messages) -> list[int]:
    """What Transformers itself makes of a conversation, text rendered whole and then cut into tokens."""
    turns = [{"role": m.role, "content": m.content} for m in messages]
    return encoder.tokenizer.apply_chat_template(turns, tokenize=True)["input_ids"]


def conversations():
    special = [*SPECIAL_TOKENS, *FOREIGN_TOKENS]
    text = st.text(min_size=1, max_size=30).filter(lambda t: not any(token in t for token in special))
    turn = st.tuples(text, st.booleans(), text)

    def build(head, turns):
        messages = [Message("system", head)] if head else []
        for question, tool, answer in turns:
            messages.append(Message("user", question))
            if tool:
                messages += [Message("assistant", "calc"), Message("tool", question)]
            messages.append(Message("assistant", answer))
        return tuple(messages)

    return st.builds(build, st.none() | text, st.lists(turn, min_size=1, max_size=4))


def supervised(encoder: Encoder, ids, mask) -> str:
    chosen = [i for i, on in zip(ids, mask, strict=True) if on]
    return encoder.tokenizer.decode(chosen, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(conversations())
def test_the_mask_is_the_answers_and_their_stop_tokens(messages):
    encoder = own()
    ids, mask = encoder.chat(messages)
    answers = [m.content for m in messages if m.role == "assistant"]
    assert supervised(encoder, ids, mask) == "".join(answer + END for answer in answers)
    assert ids.count(encoder.bos_id) == 1 and ids[0] == encoder.bos_id
    assert mask[-1] and ids[-1] == encoder.stop_ids[0]
    assert encoder.prompt(messages[:-1]) + encoder.answer(answers[-1]) == ids
    assert encoder.decode(encoder.answer(answers[-1])) == answers[-1]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(conversations())
def test_own_template_written_out_equals_the_template_rendered(messages):
    encoder = own()
    by_rendering = TemplateTurns(Renderer(CHAT_TEMPLATE, {}), encoder._special)
    assert by_rendering.shape == OwnTurns.shape
    assert by_rendering.chat(messages, "strip") == OwnTurns().chat(messages, "strip")
    assert by_rendering.prompt(messages[:-1]) == OwnTurns().prompt(messages[:-1])
    assert by_rendering.answer(messages[-1].content) == OwnTurns().answer(messages[-1].content)
    assert encoder.chat(messages)[0] == render(encoder, messages)


@pytest.mark.parametrize(("name", "stop", "bos"), [("chatml", "<|im_end|>", 0), ("llama3", "<|eot_id|>", 1)])
def test_the_mask_under_foreign_templates(name, stop, bos):
    encoder = foreign(name)

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(conversations())
    def check(messages):
        ids, mask = encoder.chat(messages)
        answers = [m.content for m in messages if m.role == "assistant"]
        expected = [a.strip() if name == "llama3" else a for a in answers]
        assert supervised(encoder, ids, mask) == "".join(answer + stop for answer in expected)
        assert ids.count(encoder.bos_id) == bos
        said = encoder.prompt(messages[:-1]) + encoder.answer(answers[-1])
        assert said == ids[: len(said)] and not any(mask[len(said) :])
        assert encoder.decode(encoder.answer(answers[-1])) == expected[-1]
        assert ids == render(encoder, messages)

    check()
    assert encoder.stop_ids == [encoder.tokenizer.convert_tokens_to_ids(stop), encoder.eos_id]


def test_what_a_template_puts_around_an_answer_is_said_by_the_model_and_cut_from_its_text():
    messages = (Message("user", "sort pear"), Message("assistant", "pear"))
    for name, text in (
        ("thinking", "<think>\n\n</think>\n\npear<|im_end|>"),
        ("llama2", " pear </s>"),
        ("channels", "<|channel|>final<|message|>pear<|im_end|>"),
    ):
        encoder = foreign(name)
        ids, mask = encoder.chat(messages)
        assert supervised(encoder, ids, mask) == text
        assert ids == render(encoder, messages)
        answer = encoder.answer("pear")
        said = encoder.prompt(messages[:1]) + answer
        assert said == ids[: len(said)] and encoder.decode(answer) == "pear"
        # An answer that is still being said shows nothing of what surrounds it.
        assert all("pear".startswith(encoder.decode(answer[:n]).strip()) for n in range(len(answer) + 1))


def test_what_a_template_changes_in_earlier_turns_is_a_choice():
    encoder = foreign("thinking")
    messages = tuple(Message(role, text) for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True))
    thought, end = "<think>\n\n</think>\n\n", "<|im_end|>"
    ids = encoder.chat(messages)[0]
    assert ids == render(encoder, messages)
    found = {}
    for choice in ("strip", "keep", "fork"):
        counts = Accounting()
        counts.read(2)
        records = [Chat(messages, Origin("x", 1)), Chat(messages[:2], Origin("x", 2))]
        rows = encode(Chats(100, "drop", choice), records, encoder, counts)
        assert counts.rows_used == 2 and not counts.dropped
        assert sum(n for note, n in counts.notes.items() if f"(earlier_turns: {choice})" in note) == 1
        found[choice] = [supervised(encoder, r["input_ids"], [i != -100 for i in r["labels"]]) for r in rows]
        assert found[choice].pop() == f"{thought}b{end}"  # the conversation with one answer
        if choice != "keep":
            assert list(rows)[-2]["input_ids"] == ids
        if choice == "fork":
            assert rows[0]["input_ids"] == render(encoder, messages[:2])
    assert found["strip"] == [f"b{end}{thought}d{end}"]
    assert found["keep"] == [f"{thought}b{end}{thought}d{end}"]
    assert found["fork"] == [f"{thought}b{end}", f"{thought}d{end}"]


def test_a_row_that_the_template_refuses_is_dropped_with_its_words():
    counts = Accounting()
    counts.read(2)
    good = (Message("user", "a"), Message("assistant", "b"))
    records = [Chat((Message("system", "s"), *good), Origin("x", 1)), Chat(good, Origin("x", 2))]
    assert len(encode(Chats(100, "drop"), records, foreign("llama2"), counts)) == 1
    assert counts.dropped == {"the chat template refuses it: no system role": 1}


def test_special_tokens_are_refused_in_messages_and_plain_text_elsewhere():
    encoder = own()
    with pytest.raises(DataError, match=r"special token <\|end\|>"):
        encoder.chat((Message("user", "say <|end|>"), Message("assistant", "no")))
    with pytest.raises(DataError, match=r"special token <\|assistant\|>"):
        encoder.prompt((Message("user", "<|assistant|>yes"),))
    for ids in (encoder.document(f"a{EOS}b"), encoder.answer(f"a{EOS}b")):
        assert not set(ids[:-1]) & set(encoder.tokenizer.all_special_ids)
    assert encoder.document("a")[-1] == encoder.eos_id
    assert encoder.decode(encoder.answer(f"a{EOS}b")) == f"a{EOS}b"


def test_tokenizers_that_cannot_be_trained_with():
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    special = list(SPECIAL_TOKENS)
    with pytest.raises(DataError, match="no eos_token"):
        Encoder(make_tokenizer(special, CHAT_TEMPLATE, bos_token=BOS, pad_token=PAD))
    with pytest.raises(DataError, match="no special token after an answer"):
        Encoder(make_tokenizer(special, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}", **names))
    with pytest.raises(DataError, match="renders a question differently once it is answered"):
        Encoder(make_tokenizer(special, "{{ messages | length }}{{ messages[-1]['content'] }}<|end|>", **names))
    documents_only = Encoder(make_tokenizer(special, None, **names))
    assert documents_only.decode(documents_only.document("pear")) == "pear"
    with pytest.raises(DataError, match="no chat template"):
        documents_only.prompt((Message("user", "a"),))


def test_an_end_token_that_only_the_models_configuration_names_is_the_encoders(tmp_path):
    tokenizer = make_tokenizer(list(SPECIAL_TOKENS), CHAT_TEMPLATE, bos_token=BOS, pad_token=PAD)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [tokenizer.convert_tokens_to_ids(EOS), 3]}))
    encoder = Encoder.from_pretrained(tmp_path, read_tokenizer(tmp_path))
    assert (encoder.eos_id, encoder.stop_ids, encoder.pad_id) == (own().eos_id, own().stop_ids, own().pad_id)
    assert encoder.document("pear") == own().document("pear")


def test_padding_needs_no_token_of_its_own():
    special = list(SPECIAL_TOKENS)
    for pad in ({}, {"pad_token": EOS}):
        encoder = Encoder(make_tokenizer(special, CHAT_TEMPLATE, bos_token=BOS, eos_token=EOS, **pad))
        assert encoder.pad_id == encoder.eos_id
        messages = (Message("user", "a"), Message("assistant", "b"))
        assert encoder.chat(messages) == own().chat(messages)


def test_a_document_begins_as_the_tokenizer_begins_texts():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(FOREIGN_TOKENS, CHATML, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    encoder = Encoder(tokenizer)
    ids = encoder.document("pear")
    assert ids[0] == encoder.bos_id and ids.count(encoder.bos_id) == 1 and ids[-1] == encoder.eos_id
    assert encoder.chat((Message("user", "a"), Message("assistant", "b")))[0].count(encoder.bos_id) == 0


def chats(*answers: str) -> list[Chat]:
    return [
        Chat((Message("user", "sort"), Message("assistant", answer)), Origin("x.jsonl", i + 1))
        for i, answer in enumerate(answers)
    ]


def test_labels_are_masked_outside_answers():
    counts = Accounting()
    counts.read(1)
    (row,) = encode(Chats(100, "drop"), chats("pear"), own(), counts)
    answer = own().answer("pear")
    assert row["labels"][-len(answer) :] == answer == row["input_ids"][-len(answer) :]
    assert set(row["labels"][: -len(answer)]) == {-100}


def test_truncation_drops_or_raises_or_keeps_the_end():
    records = chats("pear", "apple " * 40)
    long = len(own().chat(records[1].messages)[0])
    counts = Accounting()
    counts.read(2)
    assert len(encode(Chats(20, "drop"), records, own(), counts)) == 1
    assert counts.dropped == {"longer than max_length": 1} and counts.rows_used == 1
    with pytest.raises(DataError, match=rf"x.jsonl:2: {long} tokens, and max_length is 20; raise max_length"):
        encode(Chats(20, "error"), records, own(), counts)
    counts = Accounting()
    counts.read(2)
    row = encode(Chats(20, "keep_end"), records, own(), counts)[1]
    assert counts.rows_used == 2 and counts.notes["rows whose beginning was cut to max_length"] == 1
    assert len(row["input_ids"]) == len(row["labels"]) == 20
    assert row["input_ids"][0] == own().bos_id and row["labels"][0] == -100
    assert row["input_ids"][-1] == row["labels"][-1] == own().stop_ids[0]
    assert row["input_ids"][1:] == own().chat(records[1].messages)[0][-19:]


def test_every_row_too_long_is_an_error_that_names_the_shortest():
    records = chats("apple " * 40, "apple " * 50)
    shortest = len(own().chat(records[0].messages)[0])
    prompts = [Prompt((Message("user", "apple " * 40),), Origin("x", 1))]
    pairs = [Preference((Message("user", "apple"),), "pear " * 40, "no", Origin("x", 1))]
    keys = []
    for encoded, otherwise in (
        (lambda counts: encode(Chats(20, "drop"), records, own(), counts), ", or set truncation: keep_end"),
        (lambda counts: encode(Prompts(20), prompts, own(), counts), ""),
        (lambda counts: encode(Pairs(20, "keep_end"), pairs, own(), counts), ""),
    ):
        counts = Accounting()
        counts.read(2)
        with pytest.raises(
            DataError, match=rf"no row is left of .* and (max_\w*length) is 20; raise \1{otherwise}$"
        ) as error:
            encoded(counts)
        if "of 2" in str(error.value):
            assert f"has {shortest} tokens, and max_length is 20" in str(error.value)
        keys.append(re.findall(r"raise (\w+)", str(error.value))[-1])
    assert keys == ["max_length", "max_prompt_length", "max_length"]  # the key that the stages with prompts have


def test_preferences_share_the_prompt_and_stop():
    encoder, counts = own(), Accounting()
    prompt = (Message("user", "sort"),)
    answers = [("pear", "apple"), ("a", "<|end|>"), ("pear " * 30, "a")]
    records = [Preference(prompt, good, bad, Origin("x", i + 1)) for i, (good, bad) in enumerate(answers)]
    counts.read(3)
    (row,) = encode(Pairs(24, "drop"), records, encoder, counts)
    assert row["prompt_ids"] == encoder.prompt(prompt)
    assert row["chosen_ids"] == encoder.answer("pear") and row["rejected_ids"] == encoder.answer("apple")
    assert counts.dropped == {"text contains the special token <|end|>": 1, "longer than max_length": 1}
    cut = [Preference((Message("user", "sort " * 30),), "pear", "apple", Origin("x", 1))]
    (row,) = encode(Pairs(24, "keep_end"), cut, encoder, counts)
    assert len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) == 24
    assert row["prompt_ids"][0] == encoder.bos_id and row["chosen_ids"] == encoder.answer("pear")


def test_prompts_keep_their_record_and_are_never_cut():
    counts = Accounting()
    counts.read(2)
    records = [Prompt((Message("user", text),), Origin("x", 1), {"answer": "4"}) for text in ("sort", "sort " * 40)]
    (row,) = encode(Prompts(20), records, own(), counts)
    assert row.record == records[0] and row.ids == own().prompt(records[0].messages)
    assert counts.dropped == {"longer than max_prompt_length": 1}


def test_documents_are_one_stream_in_blocks():
    encoder = own()
    records = [Text(f"apple {i} pear", Origin("x", i)) for i in range(50)]
    stream = [i for record in records for i in encoder.document(record.text)]
    rows = encode(Documents(), records, encoder, Accounting())
    blocks = rows.blocks(16)
    assert rows.tokens.tolist() == stream and rows.facts["bytes"] == sum(len(record.text) for record in records)
    assert blocks.dtype == "int32" and blocks.shape == (len(stream) // 16, 16)
    assert blocks.reshape(-1).tolist() == stream[: blocks.size]
    with pytest.raises(DataError, match="fewer than one block of 100000"):
        rows.blocks(100_000)


def test_an_encoder_is_the_same_after_saving(tmp_path):
    messages = (Message("user", "naïve  café?"), Message("assistant", " apple\n"))
    for encoder in (own(), foreign("llama3")):
        encoder.tokenizer.save_pretrained(tmp_path)
        again = Encoder.from_pretrained(tmp_path)
        assert again.chat(messages) == encoder.chat(messages)
        assert (again.stop_ids, again.pad_id, again.vocab_size) == (
            encoder.stop_ids,
            encoder.pad_id,
            encoder.vocab_size,
        )
