"""Environments, and the loop in which policy and environment take turns in a conversation.

Without an environment every prompt is answered once, in a trajectory of one turn.

Tokens of earlier turns are never encoded again. After an answer that ended with a stop token, only the environment's
messages are encoded, and their tokens are appended. So the policy continues from the exact tokens that it sampled, even
where the tokenizer would encode the same text differently.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from data.encode import EncodedPrompt, Encoder
from data.errors import RowRefused, TemplateFailed
from data.records import Message, Prompt
from rollout.errors import RolloutError
from rollout.sampling import Completion
from rollout.trajectory import Actor, End, Trajectory, Turn

Complete = Callable[[Sequence[list[int]], Sequence[tuple[int | str, ...]]], list[Completion]]
"""(token ids of each conversation, key of each) -> completion of each. The keys determine the random numbers."""


@dataclass(frozen=True)
class Step:
    """The environment's response to an answer."""

    messages: tuple[Message, ...] = ()
    """Messages for the policy to read before its next turn, none with role assistant; empty ends the conversation."""
    reward: float = 0.0
    """Reward for this answer. The recipe's rewards score the whole conversation at its end."""


class Environment(Protocol):
    """Responds to the policy's answers. Each conversation has its own environment."""

    def reset(self, prompt: Prompt) -> None:
        """Begins a conversation that opens with the prompt's messages."""

    def step(self, answer: str) -> Step:
        """Responds to an answer that ended with a stop token."""


def play(
    prompts: Sequence[EncodedPrompt],
    rows: Sequence[int],
    keys: Sequence[tuple[int | str, ...]],
    complete: Complete,
    encoder: Encoder,
    environment: Callable[[], Environment] | None = None,
) -> list[Trajectory]:
    """Plays one conversation for each prompt, and returns them in the prompts' order.

    Args:
        prompts: the prompt that opens each conversation.
        rows: the row number of each trajectory.
        keys: the key of each conversation's random numbers; the policy's turn k > 0 uses (*key, k).
        complete: the engine.
        encoder: the policy's.
        environment: makes the environment of one conversation.

    Raises:
        RolloutError: the chat template changes earlier turns when later ones are added, so the policy cannot continue.
    """
    playing = [_Conversation(p, row, encoder, environment) for p, row in zip(prompts, rows, strict=True)]
    going = list(range(len(playing)))
    turn = 0
    while going:
        contexts = [[*playing[i].prompt.ids, *playing[i].ids] for i in going]
        said = complete(contexts, [(*keys[i], turn) if turn else keys[i] for i in going])
        going = [i for i, answer in zip(going, said, strict=True) if playing[i].goes_on(answer)]
        turn += 1
    return [conversation.trajectory() for conversation in playing]


class _Conversation:
    """A conversation in progress."""

    def __init__(
        self, prompt: EncodedPrompt, row: int, encoder: Encoder, environment: Callable[[], Environment] | None
    ) -> None:
        self.prompt, self._row, self._encoder = prompt, row, encoder
        self._environment = environment() if environment is not None else None
        if self._environment is not None:
            self._environment.reset(prompt.record)
        self.ids: list[int] = []
        self._logp: list[Tensor] = []
        self._turns: list[Turn] = []
        self._messages = prompt.record.messages
        self._encoded = prompt.ids  # the messages as the encoder spells them
        self._end: End = "stop"

    def goes_on(self, answer: Completion) -> bool:
        """Adds the policy's answer and the environment's response. Returns whether the policy has another turn."""
        text = self._encoder.decode(answer.ids)
        self._messages = (*self._messages, Message("assistant", text))
        self._end = answer.end
        step = Step()
        if self._environment is not None and answer.end == "stop":
            step = self._environment.step(text)
        self._add("policy", answer.ids, torch.tensor(answer.logprobs), step.reward)
        if not step.messages:
            return False
        try:
            read = self._read(step.messages)
        except TemplateFailed:
            raise
        except RowRefused:
            self._end = "refused"
            return False
        self._messages = (*self._messages, *step.messages)
        self._add("environment", read, torch.zeros(len(read)))
        return True

    def _add(self, actor: Actor, ids: list[int], logp: Tensor, reward: float = 0.0) -> None:
        start = len(self.ids)
        self.ids += ids
        self._logp.append(logp)
        self._turns.append(Turn(actor, start, len(self.ids), reward))

    def _read(self, messages: tuple[Message, ...]) -> list[int]:
        """Encodes the environment's messages and the header of the next answer."""
        assert all(message.role != "assistant" for message in messages)
        before = [*self._encoded, *self._encoder.answer(self._messages[-1].content)]
        whole = self._encoder.prompt((*self._messages, *messages))
        if whole[: len(before)] != before:
            raise RolloutError(
                "the chat template changes earlier turns of a conversation when later ones are added, so the policy "
                "cannot read on where it stopped; give the tokenizer a template that only appends"
            )
        self._encoded = whole
        return whole[len(before) :]

    def trajectory(self) -> Trajectory:
        """The conversation so far as a trajectory."""
        return Trajectory(
            row=self._row,
            prompt_ids=torch.tensor(self.prompt.ids, dtype=torch.int32),
            ids=torch.tensor(self.ids, dtype=torch.int32),
            turns=tuple(self._turns),
            end=self._end,
            engine_logp=torch.cat(self._logp),
            messages=self._messages,
        )
