"""The engine that samples the policy's answers: the one in this process, or vLLM with a copy of the weights."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from rollout.engine import generate
from rollout.sampling import Completion, SamplingSpec
from rollout.vllm import VLLMEngine
from stages.ppo.actor_critic import ActorCritic
from training.adapter import Adapter
from training.engines.protocol import Engine
from training.model import Model


class Generator:
    """Completions and forward passes without gradients, both of the policy in training."""

    def __init__(
        self,
        seed: int,
        spec: SamplingSpec,
        batch_size: int,
        processes: Engine,
        model: nn.Module,
        vllm: VLLMEngine | None,
        adapter: Adapter | None = None,
    ) -> None:
        """`processes`: the training engine. `batch_size`: rows that the in-process engine decodes at once. `adapter`:
        the policy's, which vLLM gets merged into the weights."""
        self.spec = spec
        self._seed, self._batch_size = seed, batch_size
        self._processes, self._model, self._vllm, self._adapter = processes, model, vllm, adapter
        self._version, self._pushed = 0, -1
        self.recomputes = vllm is not None or processes.bf16
        """Whether the trainer's log-probabilities may differ from the engine's."""
        self.central = vllm is not None and vllm.central
        """Whether only the main process can request completions."""
        self.together = vllm.together if vllm is not None else 1
        """Number of neighbouring processes that share one vLLM and must request the same completions."""

    def weights_moved(self) -> None:
        """Notes that the policy's weights have changed, which makes the copy in vLLM stale."""
        self._version += 1

    @property
    def stale(self) -> bool:
        """Whether vLLM's weights are older than the policy's."""
        return self._vllm is not None and self._pushed < self._version

    def push_weights(self) -> None:
        """Sends the policy's weights to vLLM. Every process calls it."""
        assert self._vllm is not None
        with self._processes.whole(self._model) as actor:
            plain = actor.policy.named_parameters() if self._adapter is None else self._adapter.parameters()
            self._vllm.update_weights(plain, self._version)
        self._pushed = self._version

    @contextmanager
    def engine(self) -> Iterator[ActorCritic | None]:
        """The model that `complete` takes; None with vLLM. Every process must enter this context. Inside it, each may
        call `complete` any number of times: only gathering a sharded model is a collective operation.
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
        """A context with the precision of training."""
        return self._processes.autocast()

    @contextmanager
    def inference(self) -> Iterator[ActorCritic]:
        """Policy and critic with all weights gathered, for forward passes without gradients in training's precision."""
        with torch.no_grad(), self._processes.whole(self._model) as actor, self._processes.autocast():
            yield actor

    def mix_into(self, reference: Model, alpha: float) -> None:
        """reference ← alpha·policy + (1 − alpha)·reference. Every process calls it."""
        self._processes.mix(reference.module, self._model, "policy", alpha)
