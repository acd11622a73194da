"""A scripted environment, and a program that runs PPO with it: python -m tests.asking RECIPE [key=value ...]"""

from functools import partial

import pytest

from data.records import Message, Prompt
from rollout.environment import Step
from stages.ppo.sampler import Sampler


class Asking:
    """Asks again after the first answer, and after the second one if it is short. Rewards short answers."""

    def reset(self, prompt: Prompt) -> None:
        self._question, self._answers = prompt.messages[-1].content, 0

    def step(self, answer: str) -> Step:
        self._answers += 1
        reward = 0.25 if len(answer) < 12 else -0.25
        if self._answers == 3 or (self._answers == 2 and reward < 0):
            return Step(reward=reward)
        return Step((Message("user", f"{self._question[:9]} {self._answers}?"),), reward)


def asking(patch: pytest.MonkeyPatch) -> None:
    """Makes the PPO stage train with the `Asking` environment."""
    patch.setattr("stages.ppo.train.Sampler", partial(Sampler, environment=Asking))


if __name__ == "__main__":
    from training.run import main

    with pytest.MonkeyPatch.context() as monkeypatch:
        asking(monkeypatch)
        main("ppo")
