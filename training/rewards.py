"""Rewards for the stages that score answers (ppo, generate, evaluate): loads them and shares the work."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from data.encode import EncodedPrompt
from data.rows import Rows
from handoff.contract import check_same_encoding
from handoff.parent import Parent
from reward.compose import Answers, Composition
from reward.config import RewardConfig
from reward.golds_check import has_checks, unreadable
from reward.learned import LearnedReward
from training.config import ModelArguments
from training.engines.protocol import Engine
from training.model import Model, load_encoder, several

if TYPE_CHECKING:
    from training.run import Run
    from training.shared import SharedBase

_LISTED = 20  # prompts shown one by one


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
    base: "SharedBase | None" = None,
) -> Composition:
    """Loads every entry of the recipe's rewards and freezes its models, which compute only inside `several(frozen)`.

    Args:
        open_model: opens the reward model that a reference names.
        policies: the policies whose answers will be scored.
        prompts: the prompts to be answered; they must have the columns that the reward functions read.
        learned: scorers whose models are already loaded, by reference; new ones are added.
        frozen: the models of these scorers; new ones are added.
        base: the weights of a policy, which reward models on the same base share.

    Raises:
        HandoffError: a reward model reads a policy's tokens (no `reencode`), but encodes text differently; or a member
            of an ensemble does not say the mean and deviation of its scores.
        DataError: a reward model that encodes the texts again (`reencode`) has no chat template.
        RewardError: an unknown function, an argument that it does not have, or a column that the prompts do not have;
            or a prompt that such a reward model cannot read.
    """
    for entry in entries:
        for ref in entry.references:
            if ref in learned:
                continue
            parent = open_model(ref)
            encoder = load_encoder(parent)
            model = None if base is None else base.model(parent, "reward", encoder)
            if model is None:
                model = Model.load(engine, parent, "reward", encoder, arguments, dtype=None, bf16=bf16, frozen=True)
            frozen.append(model.freeze())
            reencode, member = entry.reencode, entry.models is not None
            found = LearnedReward(parent, model.module, encoder, policies[0], reencode=reencode, member=member)
            engine.on_main(partial(found.check_prompts, prompts))
            learned[ref] = found
            for policy in policies[1:]:
                if not entry.reencode:
                    check_same_encoding(policy, parent, f"{ref} reads the policies' tokens; set `reencode: true`")
    composition = Composition(entries, learned)
    composition.check_columns(column_names(prompts))
    return composition


def readable(
    run: "Run", entries: Sequence[RewardConfig], prompts: Rows[EncodedPrompt], label: str, max_drop_fraction: float
) -> Rows[EncodedPrompt]:
    """The prompts whose gold answers the rewards can read. The others are listed, counted under `label`, and dropped.

    Raises:
        RewardError: a column is missing, or no gold answer can be read.
        DataError: more than `max_drop_fraction` of the prompts was dropped.
    """
    if not has_checks(entries):
        return prompts

    Composition([entry for entry in entries if entry.function is not None], {})  # refuses unknown arguments

    def look() -> dict[int, tuple[str, str]]:
        return unreadable(entries, column_names(prompts), [prompt.record.columns for prompt in prompts])

    found = run.engine.on_main(look)
    if not found:
        return prompts
    for index, (_, why) in sorted(found.items())[:_LISTED]:
        run.console.print(f"  {label}: {prompts[index].record.origin}: {why}")
    if len(found) > _LISTED:
        run.console.print(f"  {label}: and {len(found) - _LISTED} more")
    reasons = {index: f"a gold answer that `{name}` cannot read" for index, (name, _) in found.items()}
    kept = prompts.without(reasons, lambda prompt: prompt.record.origin)
    run.account(label, kept, max_drop_fraction)
    return kept


def token_readers(entries: Iterable[RewardConfig], open_model: Callable[[str], Parent]) -> list[Parent]:
    """The reward models that read the policies' own tokens, so that answers have to fit their windows too."""
    refs = dict.fromkeys(ref for entry in entries if not entry.reencode for ref in entry.references)
    return [open_model(ref) for ref in refs]


def column_names(prompts: Sequence[EncodedPrompt]) -> set[str]:
    """Names of the columns that at least one prompt has."""
    if isinstance(prompts, Rows):
        return set(prompts.facts)
    return {name for prompt in prompts for name in prompt.record.columns}


class Scorer:
    """Scores many answers, with the work shared among all processes."""

    def __init__(self, composition: Composition, engine: Engine, frozen: Sequence[Model]) -> None:
        """`frozen`: the models that the composition uses."""
        self._composition, self._engine, self._frozen = composition, engine, frozen

    def together(self, answers: Answers) -> tuple[list[float], dict[str, list[float | None]]]:
        """(weighted sums (N,), values of each entry (N,)). Each process scores its share and gets all values.

        Every process calls it with all answers. Raises the same errors as the composition.
        """
        mine = self._engine.share(len(answers.texts))
        with several(self._frozen):
            scores = self._composition(_taken(answers, mine))
        total = self._engine.join(zip(mine, scores.total, strict=True))
        parts = {name: self._engine.join(zip(mine, values, strict=True)) for name, values in scores.parts.items()}
        return total, parts


def _taken(answers: Answers, rows: Sequence[int]) -> Answers:
    """The answers with these indices."""
    return Answers(
        prompts=[answers.prompts[i] for i in rows],
        prompt_ids=[answers.prompt_ids[i] for i in rows],
        texts=[answers.texts[i] for i in rows],
        ids=[answers.ids[i] for i in rows],
        stopped=[answers.stopped[i] for i in rows],
        columns=[answers.columns[i] for i in rows],
    )
