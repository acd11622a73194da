"""The engine that the policy answers with: in this process, or vLLM, which is given the policy's weights first."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from rollout.engine import generate
from rollout.sampling import Completion, SamplingSpec
from rollout.vllm import VLLMEngine
from stages.ppo.actor_critic import ActorCritic
from training.engines.protocol import Engine
from training.model import Model


class Generator:
    """Completions of the policy that is being trained, and its forward passes without gradients."""

    def __init__(
        self,
        seed: int,
        spec: SamplingSpec,
        batch_size: int,
        processes: Engine,
        model: nn.Module,
        vllm: VLLMEngine | None,
    ) -> None:
        """`processes`: the training engine. `batch_size`: rows that the engine of this process decodes at once."""
        self.spec = spec
        self._seed, self._batch_size = seed, batch_size
        self._processes, self._model, self._vllm = processes, model, vllm
        self._version, self._pushed = 0, -1
        self.recomputes = vllm is not None or processes.bf16
        """Whether the trainer's log-probabilities may differ from the engine's."""
        self.central = vllm is not None and vllm.central
        """Whether the main process alone can ask for completions."""
        self.together = vllm.together if vllm is not None else 1
        """Neighbouring processes that have to ask for the same completions, since they share one vLLM."""

    def weights_moved(self) -> None:
        """An engine with weights of its own has to be given the policy's before it answers again."""
        self._version += 1

    @property
    def stale(self) -> bool:
        """Whether the engine has other weights than the policy."""
        return self._vllm is not None and self._pushed < self._version

    def push_weights(self) -> None:
        """Gives vLLM the policy's weights. Every process calls it."""
        assert self._vllm is not None
        with self._processes.whole(self._model) as actor:
            self._vllm.update_weights(actor.policy.named_parameters(), self._version)
        self._pushed = self._version

    @contextmanager
    def engine(self) -> Iterator[ActorCritic | None]:
        """What `complete` needs. Every process enters; inside, each may call `complete` as often as it needs.

        Under engines that shard the model, making it whole is a collective; completing is not.
        """
        if self._vllm is not None:
            yield None
        else:
            with self.inference() as actor:
                yield actor

    def complete(
        self, actor: ActorCritic | None, contexts: Sequence[list[int]], keys: Sequence[tuple[int | str, ...]]
    ) -> list[Completion]:
        """One completion for each context (token ids). (Seed, key) determines a completion's random numbers."""
        if self._vllm is not None:
            return self._vllm.generate(contexts, self.spec, keys, self._seed)
        assert actor is not None
        return generate(actor.policy, contexts, self.spec, keys, self._seed, self._batch_size)

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of training."""
        return self._processes.autocast()

    @contextmanager
    def inference(self) -> Iterator[ActorCritic]:
        """Policy and critic, whole, for forward passes without gradients in the precision of training."""
        with torch.no_grad(), self._processes.whole(self._model) as actor, self._processes.autocast():
            yield actor

    def mix_into(self, reference: Model, alpha: float) -> None:
        """reference ← alpha·policy + (1 − alpha)·reference. Every process calls it."""
        self._processes.mix(reference.module, self._model, "policy", alpha)
