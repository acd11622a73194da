"""vLLM as the engine: the policy's weights go in after each update, answers come out (docs/vllm.md).

Nothing here imports vLLM unless a recipe asks for it in this process; a server needs nothing but HTTP.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from data.sampling import uniform
from rollout.config import VLLMConfig
from rollout.sampling import Completion, SamplingSpec
from rollout.vllm_colocated import Colocated
from rollout.vllm_server import Server


class VLLMEngine:
    """Answers by vLLM, with the weights of the last `update_weights`.

    In mode `server` only the main process talks to the server (`central`): it sends the prompts of all processes, so
    that one place notices a restart, sends the weights again and asks again. The other processes hold an engine that
    does nothing. Colocated, every process answers its own prompts; the `tensor_parallel_size` processes of one vLLM
    answer the same ones.

    Args:
        config: the recipe's `vllm`.
        model_dir: what training started from, and what the server serves. Names and shapes of tensors, and the
            vocabulary, are compared with it.
        device: where this process trains.
        is_main: whether this is the main process.

    Raises:
        RolloutError: no server, or one that serves another model; vLLM cannot be imported or does not start. So do the
            methods, each with a subclass that says what happened.
    """

    def __init__(self, config: VLLMConfig, model_dir: Path, device: torch.device, is_main: bool) -> None:
        self.central = config.mode == "server"
        self.together = 1 if self.central else config.tensor_parallel_size
        """Neighbouring processes that have to ask for the same answers."""
        self._server = Server(config, model_dir, device) if self.central and is_main else None
        self._colocated = None if self.central else Colocated(config, model_dir)

    def update_weights(self, named: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Gives vLLM new weights and makes it forget what it computed with the old ones.

        Args:
            named: name and whole tensor, the names those of the model alone (`model.layers.0...`): what
                `named_parameters` or `state_dict` of the policy give. A tied tensor may come once or twice. In mode
                `server` the main process's are sent, and nothing is kept of them that later training could change.
            version: a number that grows with every update; it is part of what the server calls these weights.
        """
        if self._server is not None:
            self._server.update_weights(named, version)
        elif self._colocated is not None:
            self._colocated.update_weights(named)

    def generate(
        self, prompts: Sequence[Sequence[int]], spec: SamplingSpec, keys: Sequence[tuple[int | str, ...]], seed: int
    ) -> list[Completion]:
        """One answer a prompt, in the order of `prompts`; in mode `server` on the main process only.

        Args:
            prompts: token ids, each at least one. Equal ones are computed once: vLLM caches prefixes.
            spec: the distribution and where to stop.
            keys: one a prompt; (seed, key) gives the seed that vLLM draws the answer with, so that a rerun repeats as
                far as vLLM's arithmetic does.
            seed: of the run.
        """
        assert len(keys) == len(prompts) and (self._server or self._colocated)
        if not prompts:
            return []
        seeds = [int(uniform(1, seed, "vllm", *key)[0] * 2**53) for key in keys]
        if self._server is not None:
            return self._server.generate(prompts, spec, seeds)
        assert self._colocated is not None
        return self._colocated.generate(prompts, spec, seeds)

    def close(self) -> None:
        """Removes what was left for the server, which keeps running."""
        if self._server is not None:
            self._server.close()
