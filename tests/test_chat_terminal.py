"""Chat: the model's input, the displayed text, the end of an answer, and the choice of model."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from baton.chat import Terminal, converse
from baton.chat import talk as talk_to
from baton.speaker import ChatSampling, Speaker
from baton.targets import default_model, open_models, open_target
from data.errors import DataError
from data.records import Message
from handoff.errors import HandoffError, UserError
from handoff.manifest import sealed
from rollout.engine import generate
from rollout.live import Live
from rollout.sampling import SamplingSpec
from tests.handoff_models import published
from training.recipe import load_recipe
from training.terminal import Screen

pytestmark = pytest.mark.slow  # the first of them trains the small models


class Scripted(Live):
    """Computes with a real model, and then always chooses the tokens of the given answers."""

    def __init__(self, speaker, answers):
        super().__init__(speaker.model, 1, speaker.encoder.vocab_size)
        self.speaker, self.answers, self.asked = speaker, answers, []

    def add(self, answers):
        self.asked.append(self.speaker.encoder.tokenizer.decode(answers[0].prompt))
        words = self.answers[len(self.asked) - 1 :][:1]
        self.script = [token for answer in words for token in self.speaker.encoder.answer(answer)]
        super().add(answers)

    def _drawn(self, answers, logits):
        assert logits.shape == (1, self.model.config.vocab_size)
        return [self.script.pop(0)], [True]


@pytest.fixture
def run_dir(micro_recipe) -> Path:
    return load_recipe(micro_recipe).run_dir


@pytest.fixture
def speaker(run_dir):
    def speaker(*answers: str, max_new_tokens: int = 50) -> Speaker:
        (parent,) = open_models(run_dir, ["sft"])
        made = Speaker(parent, ChatSampling(0.0, max_new_tokens, 0))
        made.live.close()
        made.live = Scripted(made, answers)
        return made

    return speaker


def talk(lines: str, *speakers: Speaker, asks: bool = False) -> str:
    """The output and the errors of a conversation, by default outside a terminal."""
    shown = io.StringIO()
    terminal = Terminal(Screen(file=shown), Screen(file=shown), asks=asks)
    rest = iter(lines.splitlines())
    terminal.read = lambda: next(rest, None)  # type: ignore[method-assign]
    converse(terminal, speakers)
    return shown.getvalue()


def test_an_answer_ends_at_the_stop_token_and_is_remembered(speaker):
    one = speaker("good day", "fine [b]:smile:")
    assert talk("hi\n\nhow are you?\n", one) == "good day\nfine [b]:smile:\n"
    start, second = "<|bos|><|user|>hi<|end|><|assistant|>", "<|user|>how are you?<|end|><|assistant|>"
    assert one.live.asked == [start, f"{start}good day<|end|>{second}"]
    assert one.live.script == []


def test_an_answer_is_truncated_at_the_limit(speaker):
    one = speaker("abcdefgh" * 20, max_new_tokens=3)
    shown = talk("hi\n", one).strip()
    assert "abcdefgh".startswith(shown[:8])
    assert len(one.encoder.answer(shown)) <= 4


def test_streamed_pieces_never_split_a_character(speaker):
    one = speaker("naïve → 日本")
    assert "".join(one.answer("hi")) == "naïve → 日本"
    one = speaker("naïve → 日本")
    assert all("\ufffd" not in piece for piece in one.answer("hi"))


def test_commands(speaker):
    one = speaker("a", "b", "c")
    shown = talk("one\n/system be short\ntwo\n/reset\nthree\n/nothing\n/quit\nfour\n", one)
    assert shown.splitlines()[:3] == ["a", "b", "c"]
    assert shown.splitlines()[3].startswith("no command /nothing; /reset")
    system = "<|bos|><|system|>be short<|end|><|user|>"
    assert one.live.asked[1:] == [f"{system}two<|end|><|assistant|>", f"{system}three<|end|><|assistant|>"]


def test_an_inexpressible_message_is_refused_and_the_chat_continues(speaker):
    one = speaker("a")
    shown = talk("x <|end|> y\nhi\n", one)
    assert shown.splitlines() == ["text contains the special token <|end|>", "a"]
    assert len(one.turns) == 2


def test_the_oldest_exchange_is_left_out_when_the_context_is_full(speaker):
    one = speaker("b", "c")
    one.context = 40
    one.sampling = ChatSampling(0.0, 10, 0)
    one.turns = [Message("user", "first " * 3), Message("assistant", "a")] * 3
    assert talk("last\n", one) == "b\n"
    assert one.live.asked[0].endswith("<|user|>last<|end|><|assistant|>")
    assert len(one.encoder.tokenizer(one.live.asked[0], add_special_tokens=False).input_ids) <= 30
    with pytest.raises(DataError, match="too many"):
        next(one.answer("word " * 100))


def test_two_models_answer_side_by_side_each_with_its_own_history(speaker):
    left, right = speaker("one", "1"), speaker("two and more", "2")
    left.name, right.name = "left", "right"
    assert talk("hi\nagain\n", left, right) == "left: one\nright: two and more\nleft: 1\nright: 2\n"
    assert "one<|end|><|user|>again" in left.live.asked[1]
    assert "two and more<|end|><|user|>again" in right.live.asked[1]


HOSTILE = "\x1b]0;owned\x07 [/bold] a\rb \u202e"
SHOWN = "\\x1b]0;owned\\x07 [/bold] a\\rb \\u202e"


@pytest.mark.parametrize("asks", [False, True])
def test_control_characters_and_markup_of_a_model_are_shown(speaker, asks):
    one, other = speaker(*[f"x{HOSTILE}"] * 3), speaker(f"x{HOSTILE}")
    one.name = f"m{HOSTILE}"
    assert f"x{SHOWN}" in talk("hi\n", one, asks=asks)
    for text in (talk("hi\n/\x1b]0;owned\x07\n", other, one, asks=asks), talk("hi\n", one, asks=True)):
        assert "m\\x1b]0;owned" in text
        assert "\x1b" not in text and "\u202e" not in text and "\r" not in text


def test_two_models_of_one_name_keep_their_answers_apart(speaker):
    left, right = speaker("one"), speaker("two")
    left.name = right.name = "model"
    assert talk("hi\n", left, right) == "model: one\nmodel: two\n"


def test_a_line_in_another_encoding_is_refused_and_the_chat_continues(speaker):
    shown = talk("caf\udce9\nhi\n", speaker("a"))
    assert shown.splitlines() == ["a line that is not text in the encoding of this terminal: 'caf\\udce9'", "a"]


def test_a_model_without_a_template_is_talked_to_as_text(run_dir, tmp_path, root):
    shutil.copytree(run_dir / "sft" / "model", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    command = [sys.executable, "-m", "baton", "chat", str(tmp_path / "base"), "--max-new-tokens", "5"]
    done = subprocess.run(command, input="hi\n", cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("\n")
    told = "base: the conversation is put to it as text, because the tokenizer has no chat template\n"
    assert done.stderr == told


def test_options_that_cannot_be_used_are_refused(micro_recipe):
    options = {"temperature": 0.0, "max_new_tokens": 8, "seed": 0}
    with pytest.raises(UserError, match="--temperature nan"):
        talk_to(micro_recipe, "sft", None, None, **{**options, "temperature": float("nan")})
    with pytest.raises(UserError, match="is not text in this terminal's encoding"):
        talk_to(micro_recipe, "sft", None, "caf\udce9", **options)


def test_sampling_depends_on_the_seed_and_the_conversation(run_dir):
    (parent,) = open_models(run_dir, ["sft"])

    def said(seed, *lines):
        one = Speaker(parent, ChatSampling(1.0, 20, seed))
        return ["".join(one.answer(line)) for line in lines]

    first = said(3, "hi", "hi")
    assert first == said(3, "hi", "hi") and first[0] == said(3, "hi")[0]
    assert first[0] != first[1] and first[0] != said(4, "hi")[0]


def test_an_answer_is_that_of_rollouts(run_dir):
    (parent,) = open_models(run_dir, ["sft"])
    one = Speaker(parent, ChatSampling(0.0, 12, 0))
    said = "".join(one.answer("What is 2 + 3?"))
    one.live.close()
    ids = one.encoder.prompt([Message("user", "What is 2 + 3?")])
    (want,) = generate(one.model, [ids], SamplingSpec.of(one.encoder, 12, temperature=0.0), [()], 0)
    assert said == one.encoder.decode(want.ids)


def test_an_interrupted_answer_ends_and_the_chat_continues(speaker):
    """Ctrl-C comes in the middle of a step, whatever that has changed already."""
    whole = "good day to you and to all of yours"
    one = speaker(whole, "fine", "well")
    step, count = one.live.step, 0

    def interrupted():
        nonlocal count
        count += 1
        done = step()
        if count == 2:
            raise KeyboardInterrupt
        return done

    one.live.step = interrupted
    shown = talk("hi\nhow are you?\nand now?\n", one).splitlines()
    assert whole.startswith(shown[0]) and 0 < len(shown[0]) < len(whole) and shown[-2:] == ["fine", "well"]
    assert one.live.running == one.live.waiting == 0
    assert [turn.content for turn in one.turns[2:]] == ["how are you?", "fine", "and now?", "well"]


def test_what_a_command_may_be_about(run_dir, micro_recipe, tmp_path):
    for target in (micro_recipe, run_dir, f"{micro_recipe}:sft", f"{run_dir}:sft", run_dir / "sft"):
        assert open_target(str(target)).name == "sft"
    with pytest.raises(UserError, match="no section sftt"):
        open_target(f"{run_dir}:sftt")
    with pytest.raises(UserError, match="no such run"):
        open_target(str(tmp_path / "absent"))


def test_the_newest_aligned_model_is_taken(tmp_path):
    for name, stage, created in [
        ("a", "sft", 1),
        ("b", "ppo", 2),
        ("c", "dpo", 3),
        ("d", "sft", 4),
        ("e", "pretrain", 5),
    ]:
        manifest = published(tmp_path / name).manifest()
        changed = {"stage": stage, "name": name, "created": f"2026-01-0{created}T00:00:00+00:00"}
        manifest = manifest.model_copy(update=changed)
        (tmp_path / name / "stage.json").write_text(json.dumps(sealed(manifest)))
    assert default_model(tmp_path) == "c"
    shutil.rmtree(tmp_path / "c")
    shutil.rmtree(tmp_path / "b")
    assert default_model(tmp_path) == "d"
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "d")
    with pytest.raises(UserError, match="baton run <recipe> --to sft"):
        default_model(tmp_path)


def test_chat_accepts_language_models_only(micro_recipe, run_dir):
    for target in (micro_recipe, run_dir, run_dir / "sft", run_dir / "sft" / "model"):
        assert [parent.name for parent in open_models(target, [])] == ["sft"]
    with pytest.raises(UserError, match="is one model"):
        open_models(run_dir / "sft", ["ppo"])
    with pytest.raises(HandoffError, match="reward is a reward model"):
        open_models(run_dir, ["reward"])
    with pytest.raises(UserError, match="no section dpo"):
        open_models(run_dir, ["sft", "dpo"])


def test_the_command_answers_lines_from_a_pipe(micro_recipe, root):
    command = [sys.executable, "-m", "baton", "chat", str(micro_recipe), "--max-new-tokens", "8"]
    done = subprocess.run(
        [*command, "--compare", "sft", "pretrain"],
        input="hi\n/quit\n",
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.split(":")[0] for line in done.stdout.splitlines() if ":" in line][:2] == ["sft", "pretrain"]
    assert done.stderr == ""
