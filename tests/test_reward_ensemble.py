"""Learned rewards: normalised, in ensembles, per token, and for a policy with another tokenizer."""

import shutil

import pytest
import torch

from data.encode import EncodedPrompt, Encoder
from data.records import Message, Origin, Prompt
from handoff.errors import HandoffError
from handoff.files import read_json, write_json
from handoff.parent import open_parent
from reward.compose import Answers, Composition
from reward.config import RewardConfig
from reward.functions import RewardError
from reward.learned import LearnedReward, score
from tests.reward_models import NO_SYSTEM, load_reward, publish_model
from training.model import load_encoder

TEXTS = ["blue", "it is blue today", "b"]
STOPPED = [True, True, False]


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """A policy, and reward models `a`, `b`, `c` with its tokenizer."""
    root = tmp_path_factory.mktemp("rewards")
    found = {name: publish_model(root / name, seed) for seed, name in enumerate("abc", start=1)}
    return {"policy": publish_model(root / "policy", reward=False), **found}


def scorer(parent, model, policy, **keys) -> LearnedReward:
    return LearnedReward(parent, model, load_encoder(parent), policy, **keys)


def answers(policy, system: str = "") -> Answers:
    encoder = Encoder.from_pretrained(policy.model_dir)
    start = (Message("system", system),) if system else ()
    prompts = [(*start, Message("user", f"What colour {i}?")) for i in range(3)]
    ids = [encoder.answer(t) if stopped else encoder.answer(t)[:-1] for t, stopped in zip(TEXTS, STOPPED, strict=True)]
    return Answers(prompts, [encoder.prompt(p) for p in prompts], TEXTS, ids, STOPPED, [{}] * 3)


def composition(parents, *entries: RewardConfig, policy: str = "policy") -> Composition:
    models = {}
    for entry in entries:
        for ref in entry.references:
            parent = parents[ref]
            models[ref] = scorer(parent, load_reward(parent), parents[policy], reencode=entry.reencode)
    return Composition(entries, models)


def by_hand(parents, ref: str, found: Answers) -> list[float]:
    """Normalised scores of one model."""
    rows = [[*p, *c] for p, c in zip(found.prompt_ids, found.ids, strict=True)]
    parent = parents[ref]
    raw = score(load_reward(parent), rows, parent.tokenizer.pad_id)
    return ((raw - parent.manifest.extra["reward_mean"]) / 2).tolist()


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"combine": "mean"}, lambda s: s.mean(0)),
        ({"combine": "min"}, lambda s: s.min(0).values),
        ({"combine": "mean_minus_std", "std_coef": 0.5}, lambda s: s.mean(0) - 0.5 * s.std(0, correction=0)),
    ],
)
def test_an_ensemble_is_combined_after_each_member_is_normalised(parents, keys, expected):
    found = answers(parents["policy"])
    entry = RewardConfig(models=["a", "b", "c"], weight=3.0, **keys)
    scores = composition(parents, entry)(found)
    members = torch.tensor([by_hand(parents, ref, found) for ref in "abc"], dtype=torch.double)
    assert members.std(0).min() > 1e-3
    assert scores.parts["a+b+c"] == pytest.approx(expected(members).tolist(), abs=1e-5)
    assert scores.total == pytest.approx((3 * expected(members)).tolist(), abs=1e-5)
    assert scores.members.keys() == {"a+b+c/a", "a+b+c/b", "a+b+c/c"}
    assert scores.members["a+b+c/b"] == pytest.approx(members[1].tolist(), abs=1e-5)
    assert scores.disagreement == pytest.approx(members.std(0, correction=0).tolist(), abs=1e-5)


def test_the_largest_disagreement_of_several_ensembles_counts(parents):
    found = answers(parents["policy"])
    pairs = [RewardConfig(models=["a", "b"]), RewardConfig(models=["b", "c"]), RewardConfig(model="a")]
    each = [composition(parents, entry)(found).disagreement for entry in pairs]
    assert each[2] is None
    assert composition(parents, *pairs)(found).disagreement == [max(x) for x in zip(each[0], each[1], strict=True)]


def test_token_shares_sum_to_the_mean_over_the_answer(parents):
    found = answers(parents["policy"])
    scores = composition(parents, RewardConfig(model="a", read="every", weight=0.5))(found)
    for i, ids in enumerate(found.ids):
        # The reference: the score of the answer truncated after each of its tokens.
        cuts = [
            by_hand(
                parents, "a", Answers([found.prompts[i]], [found.prompt_ids[i]], [""], [ids[: t + 1]], [True], [{}])
            )
            for t in range(len(ids))
        ]
        values = [value for (value,) in cuts]
        mean = sum(values) / len(values)
        assert scores.parts["a"][i] == pytest.approx(mean, abs=1e-5)
        assert scores.total[i] == pytest.approx(0.5 * mean, abs=1e-5)
        assert scores.dense[i] == pytest.approx([0.5 * value / len(values) for value in values], abs=1e-5)
        assert sum(scores.dense[i]) == pytest.approx(scores.total[i], abs=1e-9)


def test_dense_rewards_add_up_with_other_rewards(parents):
    found = answers(parents["policy"])
    entries = [
        RewardConfig(models=["a", "b"], read="every", combine="min", weight=2.0),
        RewardConfig(model="c", read="every"),
        RewardConfig(model="a", name="whole"),
        RewardConfig(function="length_penalty", args={"free": 4}),
    ]
    scores = composition(parents, *entries)(found)
    assert [len(row) for row in scores.dense] == [len(ids) for ids in found.ids]
    for i in range(3):
        dense = 2 * scores.parts["a+b"][i] + scores.parts["c"][i]
        assert sum(scores.dense[i]) == pytest.approx(dense, abs=1e-9)
        assert scores.total[i] == pytest.approx(dense + scores.parts["whole"][i] + scores.parts["length_penalty"][i])
    # The lowest at each token is no higher than the lowest of the members' means.
    lowest = [min(pair) for pair in zip(scores.members["a+b/a"], scores.members["a+b/b"], strict=True)]
    assert all(part <= low + 1e-9 for part, low in zip(scores.parts["a+b"], lowest, strict=True))
    assert scores.disagreement is not None


def test_another_tokenizer_is_scored_after_encoding_again(parents, tmp_path):
    """The same weights with ids shifted by five give the same score of a text."""
    found = answers(parents["policy"])
    other = publish_model(tmp_path / "other", 1, spare=5)
    models = {"other": load_reward(other), "a": load_reward(parents["a"])}
    with torch.no_grad():
        rows, own = models["other"].get_input_embeddings().weight, models["a"].get_input_embeddings().weight
        first = len(rows) - 256
        rows[: first - 5], rows[first:] = own[: first - 5], own[first - 5 :]
        models["other"].load_state_dict(
            {k: v for k, v in models["a"].state_dict().items() if "embed" not in k}, strict=False
        )
    again = scorer(other, models["other"], parents["policy"], reencode=True)
    direct = scorer(parents["a"], models["a"], parents["policy"], reencode=False)
    given = (found.prompts, found.texts, found.prompt_ids, found.ids, found.stopped)
    assert again(*given) == pytest.approx(direct(*given), abs=1e-5)
    with pytest.raises(HandoffError, match=r"have different tokenizers .* set `reencode: true`"):
        scorer(other, models["other"], parents["policy"], reencode=False)


def test_a_prompt_that_the_reward_models_template_refuses(parents, tmp_path):
    strict = publish_model(tmp_path / "strict", 1, template=NO_SYSTEM)
    entry = RewardConfig(model="strict", reencode=True)
    with pytest.raises(RewardError) as raised:
        composition({**parents, "strict": strict}, entry)(answers(parents["policy"], system="Be brief."))
    assert str(raised.value) == (
        "reward model strict: prompt 'What colour 0?': the chat template refuses it: no system role"
    )


def test_prompts_that_a_reward_model_cannot_read_are_named_before_any_answer_is_sampled(parents, tmp_path):
    """Only with `reencode`; without it, the reward model reads the policy's tokens."""
    found = answers(parents["policy"], system="Be brief.")
    prompts = [
        EncodedPrompt(ids, Prompt(messages, Origin("x.jsonl", row), {}))
        for row, (messages, ids) in enumerate(zip(found.prompts, found.prompt_ids, strict=True), 1)
    ]
    strict = publish_model(tmp_path / "strict", 1, template=NO_SYSTEM)
    with pytest.raises(RewardError, match=r"^x.jsonl:1: reward model strict cannot read this prompt .* no system role"):
        scorer(strict, load_reward(strict), parents["policy"], reencode=True).check_prompts(prompts)
    scorer(parents["a"], load_reward(parents["a"]), parents["policy"], reencode=True).check_prompts(prompts)
    scorer(parents["a"], load_reward(parents["a"]), parents["policy"], reencode=False).check_prompts(prompts)


def test_scores_of_a_model_from_elsewhere_are_taken_as_they_are(parents, tmp_path, caplog):
    """Also of one whose tokenizer names no pad token, for which the hand-off has chosen one."""
    foreign = tmp_path / "foreign"
    shutil.copytree(parents["a"].model_dir, foreign)
    config = read_json(foreign / "tokenizer_config.json")
    write_json(foreign / "tokenizer_config.json", {k: v for k, v in config.items() if k != "pad_token"})
    parent = open_parent(str(foreign), tmp_path, {"reward_model"})
    assert Encoder.from_pretrained(foreign, parent.tokenizer).pad_id == parent.tokenizer.pad_id
    own = scorer(parents["a"], load_reward(parents["a"]), parents["policy"], reencode=True)
    raw = scorer(parent, load_reward(parents["a"]), parents["policy"], reencode=True)
    assert "trained elsewhere" in caplog.text
    found = answers(parents["policy"])
    rows = (found.prompts, found.texts, found.prompt_ids, found.ids, found.stopped)
    assert raw(*rows) == pytest.approx([own.mean + own.std * value for value in own(*rows)], abs=1e-5)
    with pytest.raises(HandoffError, match="cannot be compared with those of the other members of the ensemble"):
        scorer(parent, load_reward(parents["a"]), parents["policy"], reencode=True, member=True)


def test_of_a_row_that_exceeds_a_reward_models_own_window_the_end_is_read(parents, tmp_path, caplog):
    """Encoded again, a text may have more tokens than the policy's. The answer is sampled by then: no run ends here."""
    short = tmp_path / "short"
    shutil.copytree(parents["a"].model_dir, short)
    write_json(short / "config.json", read_json(short / "config.json") | {"max_position_embeddings": 12})
    parent = open_parent(str(short), tmp_path, {"reward_model"})
    found = answers(parents["policy"])
    learned = scorer(parent, load_reward(parents["a"]), parents["policy"], reencode=True)
    rows = learned._reencoded(found.prompts, found.texts, found.stopped)
    whole = scorer(parents["a"], load_reward(parents["a"]), parents["policy"], reencode=True)
    wanted = whole._reencoded(found.prompts, found.texts, found.stopped)
    assert max(map(len, wanted)) > 12
    assert rows == [row[-12:] for row in wanted]
    assert "it reads the last 12 (max_position_embeddings)" in caplog.text
