"""What readers make of columns and turns that say more than a question and its answer."""

import json

import pytest

from data.config import FileSource
from data.records import Chat, Message, Preference, Prompt, Text
from data.rows import Chats
from tests.row_sets import encode, load
from tests.test_data_encode import foreign, own, supervised

U, A, S = "user", "assistant", "system"


def read(folder, rows, want, **settings):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load([FileSource(source="file", path="rows.jsonl", **settings)], want, folder, seed=0)


def turns(messages) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in messages]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "output": "a", "history": [["q0", "a0"]]},
        {"prompt": "q", "completion": "a", "history": [["q0", "a0"]]},
        {"question": "q", "answer": "so #### a", "history": [["q0", "a0"]]},
        {"instruction": "q", "output": "a", "history": [{"role": U, "content": "q0"}, {"role": A, "content": "a0"}]},
        {"prompt": "q", "chosen": "a", "rejected": "b", "history": [["q0", "a0"]]},
    ],
)
def test_history_comes_before_the_question(tmp_path, row):
    (record,) = read(tmp_path, [row | {"system": "s"}], Prompt).records
    assert turns(record.messages) == [(S, "s"), (U, "q0"), (A, "a0"), (U, "q")]
    assert not {"history", "system"} & record.columns.keys()


def test_a_system_column_is_used_by_every_format(tmp_path):
    talk = [{"role": U, "content": "q"}, {"role": A, "content": "a"}]
    bad = [talk[0], {"role": A, "content": "b"}]
    for row in (
        {"prompt": "q", "completion": "a"},
        {"prompt": talk[:1], "completion": talk[1:]},
        {"messages": talk},
        {"messages": [{"role": S, "content": "s"}, *talk]},
        {"messages": [{"role": S, "content": " "}, *talk]},
        {"chosen": talk, "rejected": bad},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    ):
        for name in ("system", "system_prompt"):
            loaded = read(tmp_path, [row | {name: "s"}], Chat)
            assert turns(loaded.records[0].messages) == [(S, "s"), (U, "q"), (A, "a")]
            assert not any("not read" in note for note in loaded.accounting.notes)
    other = {"messages": [{"role": S, "content": "another"}, *talk], "system": "s"}
    counts = read(tmp_path, [{"messages": talk}, other], Chat).accounting
    assert counts.dropped == {"two system messages": 1}


@pytest.mark.parametrize(("good", "bad"), [(True, False), (1, 0), ("True", "False"), ("1", "0")])
def test_an_answer_that_is_labelled_as_bad_is_not_trained_on(tmp_path, good, bad):
    for name in ("label", "kto_tag"):
        for row in (
            {"prompt": "q", "completion": "a"},
            {"instruction": "q", "output": "a"},
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        ):
            counts = read(tmp_path, [row | {name: good}, row | {name: bad}], Chat).accounting
            assert counts.dropped == {f"labelled as a bad answer ({name}: false)": 1}
            assert f"set `ignore: [{name}]` in the source to use it all the same" in counts.summary()
            assert not any("not read" in note for note in counts.notes)
    # Another label is a column like any, and so is one beside a prompt without an answer.
    counts = read(tmp_path, [{"prompt": "q", "completion": "a", "label": value} for value in ("angry", 3, 0.5)], Chat)
    assert counts.accounting.notes["file:rows.jsonl: column `label` not read"] == 3
    assert read(tmp_path, [{"prompt": "q", "label": bad}], Prompt).records[0].columns == {"label": bad}


def test_only_answers_that_are_to_be_trained_on_are_in_the_mask(tmp_path):
    def talk(*weights):
        pairs = [
            [{"role": U, "content": "q"}, {"role": A, "content": f"a{n}"} | weight] for n, weight in enumerate(weights)
        ]
        return [turn for pair in pairs for turn in pair]

    rows = [
        {"messages": talk({"weight": 0}, {"weight": 1})},
        {"messages": talk({}, {"train": False}, {"loss_weight": 1.0})},
        {"messages": talk({"trainable": True}, {"loss": False})},
        {"messages": talk({"weight": 0}, {"weight": 0})},
        {"messages": talk({}, {"loss_weight": 0.5})},
        {"messages": talk({}, {"sample_weight": False})},
    ]
    loaded = read(tmp_path, rows, Chat)
    assert loaded.accounting.dropped == {
        "no answer is to be trained on": 1,
        "`loss_weight` is neither 0 nor 1": 1,
    }
    assert loaded.accounting.notes["conversations whose turns after the last answer were cut"] == 2
    for encoder, end in ((own(), "<|end|>"), (foreign("chatml"), "<|im_end|>")):
        trained = []
        for row in encode(Chats(128, "drop"), loaded.records, encoder, loaded.accounting):
            mask = [label != -100 for label in row["labels"]]
            trained.append(supervised(encoder, row["input_ids"], mask))
        assert trained == [f"a1{end}", f"a0{end}a2{end}", f"a0{end}", f"a0{end}"]
    # A prompt keeps its place in the conversation, but an answer that is not to be learned is no reference.
    prompts = read(tmp_path, [rows[2]], Prompt).records
    assert prompts[0].columns == {} and len(prompts[0].messages) == 3


WEIGHED = {
    Text: {"text": "a text"},
    Chat: {"messages": [{"role": U, "content": "q"}, {"role": A, "content": "a"}]},
    Preference: {"prompt": "q", "chosen": "a", "rejected": "b"},
}


@pytest.mark.parametrize("want", WEIGHED)
@pytest.mark.parametrize("name", ["weight", "loss_weight", "sample_weight", "train", "trainable"])
def test_the_weight_of_a_row_follows_one_rule_in_every_reader(want, name, tmp_path):
    rows = [WEIGHED[want] | {name: value} for value in (1, True, "1", None, 0, False, 0.5, "much")]
    counts = read(tmp_path, rows, want).accounting
    assert counts.rows_used == 4 and not any("not read" in note for note in counts.notes)
    assert counts.dropped == {f"`{name}` is 0": 2, f"`{name}` is neither 0 nor 1": 2}
    assert read(tmp_path, rows, want, ignore=[name]).accounting.rows_used == 8


def test_the_weight_of_a_turn_that_is_no_answer_follows_the_same_rule(tmp_path):
    rows = [{"messages": [{"role": U, "content": "q", "weight": w}, {"role": A, "content": "a"}]} for w in (0, 1, 0.5)]
    counts = read(tmp_path, rows, Chat).accounting
    assert counts.rows_used == 2 and counts.dropped == {"`weight` is neither 0 nor 1": 1}
    assert counts.notes["`weight` of turns that are not answers: they are never trained on"] == 1


def test_the_weight_of_a_prompt_is_a_column_for_its_rewards(tmp_path):
    (prompt,) = read(tmp_path, [{"prompt": "q", "weight": 70.5}], Prompt).records
    assert prompt.columns == {"weight": 70.5}


def test_the_weight_of_a_turn_does_not_change_which_rows_a_mixture_takes():
    assert repr(Message(A, "a", trained=False)) == repr(Message(A, "a"))


def test_a_transcript_as_prompt_is_split_into_turns(tmp_path):
    prompt = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"
    expected = [(U, "one"), (A, "two"), (U, "three")]
    (chat,) = read(tmp_path, [{"prompt": prompt, "completion": " four"}], Chat).records
    assert turns(chat.messages) == [*expected, (A, "four")]
    whole = {"prompt": prompt, "chosen": f"{prompt} four", "rejected": f"{prompt} five"}
    loaded = read(tmp_path, [{"prompt": prompt, "chosen": " four", "rejected": " five"}, whole], Preference)
    for pair in loaded.records:
        assert (turns(pair.prompt), pair.chosen, pair.rejected) == (expected, "four", "five")
    assert not any("not read" in note for note in loaded.accounting.notes)


def test_answers_that_repeat_their_prompt_are_dropped(tmp_path):
    good = {"prompt": "q", "chosen": "q is a letter", "rejected": "q is a number"}
    bad = {"prompt": "Which letter is it? ", "chosen": "Which letter is it? q", "rejected": "Which letter is it? r"}
    counts = read(tmp_path, [good, bad], Preference).accounting
    assert counts.dropped == {"answers begin with the prompt": 1}
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in (good, bad)]
    assert read(tmp_path, rows, Chat).accounting.dropped == {"answers begin with the prompt": 1}


def test_pairs_whose_own_scores_say_the_opposite_are_dropped(tmp_path):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows = [
        pair | {"score_chosen": 2, "score_rejected": 1.5, "margin": 0.5},
        pair | {"score_chosen": 1, "score_rejected": 1},
        pair | {"score_chosen": 1, "score_rejected": 2},
        pair | {"chosen_score": 1, "rejected_score": 2},
        pair | {"margin": -1},
        pair | {"score_chosen": "high", "score_rejected": None},
    ]
    counts = read(tmp_path, rows, Preference).accounting
    assert counts.rows_used == 3 and counts.notes["pairs whose two scores are equal"] == 1
    assert counts.dropped == {
        "score_rejected is above score_chosen": 1,
        "rejected_score is above chosen_score": 1,
        "margin is negative": 1,
    }
    names = ["score_chosen", "score_rejected", "chosen_score", "rejected_score", "margin"]
    assert read(tmp_path, rows, Preference, ignore=names).accounting.rows_used == 6


def test_pairs_that_contradict_each_other_are_named(tmp_path):
    pairs = [("q", "a", "b"), ("q", "b", "a"), ("r", "b", "a"), ("q", "a", "b"), ("q", "a", "c")]
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs]
    counts = read(tmp_path, rows, Preference).accounting
    assert counts.rows_used == 5
    assert counts.notes["pairs that prefer the answer which an earlier pair rejects"] == 2


def test_only_commas_that_group_digits_go_from_a_final_answer(tmp_path):
    finals = {
        "1,250": "1250", "$12,345,678.90": "$12345678.90", "-1,004 dollars": "-1004 dollars", "(3, 4)": "(3, 4)",
        "1,2": "1,2", "(1,250)": "(1,250)", "1,000, 2,000": "1,000, 2,000", "12,34": "12,34", "7": "7",
    }  # fmt: skip
    rows = [{"question": "q", "answer": f"so\n#### {final}"} for final in finals]
    assert [r.columns["answer"] for r in read(tmp_path, rows, Prompt).records] == list(finals.values())
    headings = {"question": "q", "answer": "#### One\nDo this.\n#### Two\nDo that."}
    assert read(tmp_path, [*rows, headings], Prompt).accounting.dropped == {"no final answer after ####": 1}


def test_a_users_own_reference_stays(tmp_path):
    rows = [
        {"prompt": "q", "completion": "a", "reference": "mine"},
        {"prompt": "q", "chosen": "a", "rejected": "b", "reference": "mine"},
    ]
    for row in rows:
        loaded = read(tmp_path, [row], Prompt)
        assert loaded.records[0].columns == {"reference": "mine"}
        assert loaded.accounting.notes["rows that keep their own column `reference` in place of their answer"] == 1


def test_a_prompt_without_a_users_turn_is_dropped(tmp_path):
    alone = {"messages": [{"role": S, "content": "Tell me a joke."}]}
    asked = {"messages": [{"role": U, "content": "q"}]}
    for split in ("train", "all"):
        held = {} if split == "all" else {"holdout": 0.01, "split": split}
        loaded = read(tmp_path, [alone, asked], Prompt, **held)
        assert loaded.accounting.dropped == {"no turn of the user": 1} and len(loaded.records) == 1
