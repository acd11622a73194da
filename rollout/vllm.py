"""vLLM as the rollout engine: receives the policy's weights after each update, and generates answers (docs/vllm.md).

vLLM is imported only if the recipe colocates it in this process; a server needs only HTTP.
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
    """Generates answers with vLLM and the weights of the last `update_weights`.

    In mode `server` only the main process talks to the server (`central`). It sends the prompts of all processes, so
    that one process notices a restart, sends the weights again and repeats the requests. The engines of the other
    processes do nothing. In mode `colocate` every process answers its own prompts; the `tensor_parallel_size` processes
    that share a vLLM answer the same prompts.

    Args:
        config: the recipe's `vllm` section.
        model_dir: the model that training started from and that the server serves. Names and shapes of tensors, and
            the vocabulary, are compared with it.
        device: the device on which this process trains.
        is_main: whether this is the main process.
        processes: number of training processes.

    Raises:
        RolloutError: there is no server, or it serves another model; or vLLM cannot be imported or does not start. The
            methods raise subclasses that name the fault.
    """

    def __init__(
        self, config: VLLMConfig, model_dir: Path, device: torch.device, is_main: bool, processes: int = 1
    ) -> None:
        self.central = config.mode == "server"
        self.together = 1 if self.central else config.tensor_parallel_size
        """Number of neighbouring processes that must request the same answers."""
        self._server = Server(config, model_dir, device) if self.central and is_main else None
        self._colocated = None if self.central else Colocated(config, model_dir, processes)

    def update_weights(self, named: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Sends new weights to vLLM and empties its caches.

        Args:
            named: names and whole tensors, as the policy's `named_parameters` or `state_dict` give them, without
                prefixes (`model.layers.0...`). A tied tensor may occur once or twice. In mode `server` the main
                process's tensors are copied and sent, so that later training does not change them.
            version: a number that grows with every update; it is part of the server's tag for these weights.
        """
        if self._server is not None:
            self._server.update_weights(named, version)
        elif self._colocated is not None:
            self._colocated.update_weights(named)

    def generate(
        self, prompts: Sequence[Sequence[int]], spec: SamplingSpec, keys: Sequence[tuple[int | str, ...]], seed: int
    ) -> list[Completion]:
        """One answer per prompt, in the order of `prompts`; in mode `server` on the main process only.

        Args:
            prompts: token ids, each at least one. Equal prompts are computed once, since vLLM caches prefixes.
            spec: the sampling distribution and the stop ids.
            keys: one per prompt; (seed, key) gives vLLM's seed for the answer, so that a rerun repeats as far as vLLM's
                arithmetic is deterministic.
            seed: the run's seed.
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
        """Removes the files written for the server, which keeps running."""
        if self._server is not None:
            self._server.close()
