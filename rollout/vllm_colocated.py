"""Generation by a vLLM inside the training process, on the same GPU.

Every process answers its own prompts. With `tensor_parallel_size` above 1, that many processes share one vLLM, which
needs the same prompts, seeds and weights from each of them, in the same order.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from rollout.config import VLLMConfig
from rollout.errors import EngineMissing
from rollout.sampling import Completion, SamplingSpec
from rollout.vllm_answers import check_fit, completion, sampling
from rollout.vllm_weights import DTYPES, Stored, cast


class Colocated:
    """This process's vLLM. Raises EngineMissing when it cannot be imported or does not start."""

    def __init__(self, config: VLLMConfig, model_dir: Path, processes: int) -> None:
        """`processes`: of the training run."""
        # Run the engine in this process, so that weights are passed in memory. vLLM reads this when it is imported.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise EngineMissing(
                f"vllm.mode colocate needs vLLM in the training processes ({error}); install it, or start a server and "
                "use `mode: server` (docs/vllm.md)"
            ) from error
        if processes % config.tensor_parallel_size:
            raise EngineMissing(
                f"vllm.tensor_parallel_size {config.tensor_parallel_size} does not divide the {processes} processes"
            )
        self._stored, self._dtype = Stored.read(model_dir), DTYPES[config.dtype]
        self._params = SamplingParams
        try:
            self._llm: Any = LLM(
                model=str(model_dir),
                dtype=config.dtype,
                skip_tokenizer_init=True,
                tensor_parallel_size=config.tensor_parallel_size,
                gpu_memory_utilization=config.gpu_memory_utilization,
                max_model_len=config.max_model_len,
                distributed_executor_backend="external_launcher" if processes > 1 else "uni",
                logprobs_mode="processed_logprobs",
            )
        except (ValueError, RuntimeError) as error:
            raise EngineMissing(
                f"vLLM does not start beside training: {error} (vllm.gpu_memory_utilization "
                f"{config.gpu_memory_utilization:g}, vllm.max_model_len {config.max_model_len})"
            ) from error

    def update_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Gives vLLM these weights in memory, and empties its prefix cache, which the old weights had computed."""
        weights = self._stored.select(named)
        cast_one_by_one = ((name, cast(tensor, self._dtype)) for name, tensor in weights.items())
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": cast_one_by_one})
        emptied = self._llm.reset_prefix_cache()
        assert emptied, "no request may be running between two calls"

    def generate(self, prompts: Sequence[Sequence[int]], spec: SamplingSpec, seeds: list[int]) -> list[Completion]:
        """One answer per prompt, in order. `seeds`: one per prompt. Raises RolloutError for an unusable answer."""
        check_fit(prompts, spec, self._llm.llm_engine.model_config.max_model_len, self._stored.vocab_size)
        params = [
            self._params(**sampling(spec, seed), max_tokens=spec.max_new_tokens, detokenize=False) for seed in seeds
        ]
        outputs = self._llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
        out = []
        for request in outputs:
            (answer,) = request.outputs
            ids = list(answer.token_ids)
            found = answer.logprobs or []
            logprobs = [entry[token].logprob for entry, token in zip(found, ids, strict=False)]
            out.append(completion(ids, logprobs, answer.finish_reason == "stop", spec, self._stored.vocab_size))
        return out
