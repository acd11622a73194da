"""Rewards for the stages that score answers: ppo, generate and evaluate. Loading them, and sharing the work."""

from collections.abc import Callable, Sequence

from data.encode import EncodedPrompt
from data.rows import Rows
from handoff.contract import check_same_encoding
from handoff.parent import Parent
from reward.compose import Answers, Composition
from reward.config import RewardConfig
from reward.learned import LearnedReward
from training.config import ModelArguments
from training.engines.protocol import Engine
from training.model import Model, load_encoder, several


def load_rewards(
    engine: Engine,
    entries: Sequence[RewardConfig],
    open_model: Callable[[str], Parent],
    policies: Sequence[Parent],
    prompts: Sequence[EncodedPrompt],
    arguments: ModelArguments,
    *,
    bf16: bool,
    learned: dict[str, LearnedReward],
    frozen: list[Model],
) -> Composition:
    """Every entry, with its models frozen. They compute inside `several(frozen)`.

    Args:
        open_model: opens the reward model of a reference.
        policies: whose answers are to be scored.
        prompts: what they answer; functions are checked against the columns of these.
        learned: scorers whose models are loaded already, by reference; new ones are added.
        frozen: those models; new ones are added.

    Raises:
        HandoffError: a model reads the policies' tokens (no `reencode`), and one of them encodes otherwise.
        RewardError: an unknown function, an argument that it does not have, or a column that the prompts do not have.
    """
    for entry in entries:
        for ref in entry.references:
            if ref in learned:
                continue
            parent = open_model(ref)
            model = Model.load(engine, parent, "reward", load_encoder(parent), arguments, bf16=bf16).freeze()
            frozen.append(model)
            learned[ref] = LearnedReward(parent, model.module, policies[0], reencode=entry.reencode)
            for policy in policies[1:]:
                if not entry.reencode:
                    check_same_encoding(policy, parent, f"{ref} reads the policies' tokens; set `reencode: true`")
    composition = Composition(entries, learned)
    composition.check_columns(column_names(prompts))
    return composition


def column_names(prompts: Sequence[EncodedPrompt]) -> set[str]:
    """Columns that any of the prompts has."""
    if isinstance(prompts, Rows):
        return set(prompts.facts)
    return {name for prompt in prompts for name in prompt.record.columns}


class Scorer:
    """Scores of many answers, computed by all processes together."""

    def __init__(self, composition: Composition, engine: Engine, frozen: Sequence[Model]) -> None:
        """`frozen`: the models that the composition reads."""
        self._composition, self._engine, self._frozen = composition, engine, frozen

    def together(self, answers: Answers) -> tuple[list[float], dict[str, list[float | None]]]:
        """(weighted sums (N,), each entry's own values (N,)). Each process scores its share and gets all values.

        Every process calls it with all answers. Raises what the composition raises.
        """
        mine = self._engine.share(len(answers.texts))
        with several(self._frozen):
            scores = self._composition(_taken(answers, mine))
        total = self._engine.join(zip(mine, scores.total, strict=True))
        parts = {name: self._engine.join(zip(mine, values, strict=True)) for name, values in scores.parts.items()}
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
