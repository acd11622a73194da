"""Rewards for the stages that score answers: ppo, generate and evaluate. Loading them, and sharing the work."""

from collections.abc import Callable, Sequence

from data.encode import EncodedPrompt
from handoff.contract import check_same_encoding
from handoff.parent import Parent
from reward.compose import Answers, Composition
from reward.config import RewardConfig
from reward.learned import LearnedReward
from training import models, runtime
from training.config import ModelArguments


def load_rewards(
    entries: Sequence[RewardConfig],
    open_model: Callable[[str], Parent],
    policies: Sequence[Parent],
    prompts: Sequence[EncodedPrompt],
    arguments: ModelArguments,
    *,
    bf16: bool,
    learned: dict[str, LearnedReward],
) -> Composition:
    """Every entry, with its models frozen and on this process's device.

    Args:
        open_model: opens the reward model of a reference.
        policies: whose answers are to be scored.
        prompts: what they answer; functions are checked against the columns of these.
        learned: models that are loaded already, by reference; those that are not are loaded into it.

    Raises:
        HandoffError: a model reads the policies' tokens (no `reencode`), and one of them encodes otherwise.
        RewardError: an unknown function, an argument that it does not have, or a column that the prompts do not have.
    """
    for entry in entries:
        for ref in entry.references:
            if ref in learned:
                continue
            parent = open_model(ref)
            model = models.load_reward_model(parent, arguments, bf16=bf16).eval().requires_grad_(False)
            model.to(runtime.device())
            learned[ref] = LearnedReward(parent, model, policies[0], reencode=entry.reencode)
            for policy in policies[1:]:
                if not entry.reencode:
                    check_same_encoding(policy, parent, f"{ref} reads the policies' tokens; set `reencode: true`")
    composition = Composition(entries, learned)
    composition.check_columns({name for prompt in prompts for name in prompt.record.columns})
    return composition


def score_together(composition: Composition, answers: Answers) -> tuple[list[float], dict[str, list[float | None]]]:
    """(weighted sums (N,), each entry's own values (N,)). Every process scores its share and gets all values.

    Every process calls it with all answers. Raises what the composition raises.
    """
    count = len(answers.texts)
    mine = list(range(runtime.rank(), count, runtime.world_size()))
    scores = composition(_taken(answers, mine))
    shares = runtime.all_gather_object((mine, scores.total, scores.parts))
    total = [0.0] * count
    parts: dict[str, list[float | None]] = {name: [None] * count for name in scores.parts}
    for rows, totals, values in shares:
        for at, row in enumerate(rows):
            total[row] = totals[at]
            for name, column in values.items():
                parts[name][row] = column[at]
    return total, parts


def _taken(answers: Answers, rows: Sequence[int]) -> Answers:
    """Some of the answers."""
    return Answers(
        prompts=[answers.prompts[i] for i in rows],
        prompt_ids=[answers.prompt_ids[i] for i in rows],
        texts=[answers.texts[i] for i in rows],
        ids=[answers.ids[i] for i in rows],
        stopped=[answers.stopped[i] for i in rows],
        columns=[answers.columns[i] for i in rows],
    )
