"""Builds vLLM's sampling parameters for an answer and checks its reply, for both a server and a colocated vLLM."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from rollout.errors import LogprobsMissing, ServerFailed, WrongAnswer, WrongModel
from rollout.sampling import Completion, SamplingSpec

_LOWEST = -9999.0  # vLLM's value for a log-probability of minus infinity
_NEVER = -100.0  # the lowest bias that vLLM accepts, nats
_ROUNDING = 1e-3  # a log-probability may be above 0 by this much, nats


def check_fit(prompts: Sequence[Sequence[int]], spec: SamplingSpec, window: int, vocab_size: int) -> None:
    """Raises WrongModel when prompt and answer are longer than `window`, the longest sequence that vLLM accepts.

    Also when a token is not in the vocabulary, which would kill the engine (seen with vLLM 0.31).
    """
    longest = max(len(prompt) for prompt in prompts)
    if longest + spec.max_new_tokens > window:
        raise WrongModel(
            f"vLLM takes {window} tokens at most; a prompt of {longest} and an answer of up to {spec.max_new_tokens} "
            f"need {longest + spec.max_new_tokens}: start the server with a larger --max-model-len (colocated: "
            "vllm.max_model_len), or shorten max_prompt_length or max_completion_length"
        )
    assert all(prompts) and all(0 <= token < vocab_size for prompt in prompts for token in prompt)


def sampling(spec: SamplingSpec, seed: int, rows: int) -> dict[str, Any]:
    """vLLM's sampling parameters for a spec, including every parameter that could change the distribution. `ignore_eos`
    is set because vLLM would otherwise add the stop ids of generation_config.json to the spec's. `rows`: ids that the
    model has; those without a token get a bias with which they are never sampled."""
    without_token = range(_ids(spec, rows), rows)
    return {
        "temperature": spec.temperature,
        "top_p": 1.0 if spec.top_p is None else spec.top_p,
        "top_k": spec.top_k or 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": seed,
        "stop_token_ids": list(spec.stop_ids),
        "ignore_eos": True,
        "logprobs": 0,
        **({"logit_bias": dict.fromkeys(without_token, _NEVER)} if without_token else {}),
    }


def _ids(spec: SamplingSpec, rows: int) -> int:
    """The number of ids that may be sampled."""
    return rows if spec.vocab_size is None else spec.vocab_size


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Logprobs(_Strict):
    tokens: list[str]
    token_logprobs: list[float | None]


class _Choice(_Strict):
    prompt_token_ids: list[int]
    token_ids: list[int]
    finish_reason: str
    logprobs: _Logprobs | None


class _Answer(_Strict):
    choices: list[_Choice]


def read(answer: Any, prompt: list[int], spec: SamplingSpec, rows: int) -> Completion:
    """The completion in a response of /v1/completions, checked against the request. `rows`: ids that the model has.

    Raises:
        ServerFailed: the response is malformed, or the server aborted the request.
        WrongAnswer: the number of answers, the prompt, the length or the end do not match the request, or a token is
            not in the vocabulary.
        LogprobsMissing: a token has no log-probability, or one above 0.
    """
    try:
        choices = _Answer.model_validate(answer).choices
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ServerFailed(f"the response is not a completion of vLLM: {place}: {first['msg']}") from error
    if len(choices) != 1:
        raise WrongAnswer(f"the server sent {len(choices)} answers to a request for one")
    choice = choices[0]
    ids = choice.token_ids
    if choice.finish_reason not in ("stop", "length"):
        raise ServerFailed(f"the server aborted the answer (finish_reason {choice.finish_reason})")
    if choice.prompt_token_ids != prompt:
        raise WrongAnswer("the server answered another prompt than it was sent: it truncated it, or added tokens")
    if choice.logprobs is None:
        raise LogprobsMissing("the server sent no log-probabilities, although they were requested")
    if choice.logprobs.tokens != [f"token_id:{token}" for token in ids]:
        raise WrongAnswer(
            f"{len(choice.logprobs.tokens)} log-probabilities are not those of the answer's {len(ids)} tokens"
        )
    return completion(ids, choice.logprobs.token_logprobs, choice.finish_reason == "stop", spec, rows)


def completion(
    ids: Sequence[int], logprobs: Sequence[float | None], stopped: bool, spec: SamplingSpec, rows: int
) -> Completion:
    """A Completion from vLLM's tokens and log-probabilities. Raises as `read` does."""
    outside = [token for token in ids if not 0 <= token < _ids(spec, rows)]
    if outside:
        raise WrongAnswer(f"an answer has the id {outside[0]}, but the vocabulary has {_ids(spec, rows)}")
    early = next((place for place, token in enumerate(ids[:-1]) if token in spec.stop_ids), None)
    if early is not None:
        raise WrongAnswer(f"an answer of {len(ids)} tokens goes on after the stop token in place {early}")
    numbers = [value for value in logprobs if value is not None and math.isfinite(value) and value > _LOWEST]
    if not len(numbers) == len(logprobs) == len(ids):
        raise LogprobsMissing(f"{len(ids)} tokens came with {len(numbers)} log-probabilities")
    above = [value for value in numbers if value > _ROUNDING]
    if above:
        raise WrongAnswer(f"an answer has a token with log-probability {above[0]:g}; none is above 0")
    end: Literal["stop", "length"] = "stop" if ids and ids[-1] in spec.stop_ids else "length"
    if stopped and end != "stop":
        raise WrongAnswer("an answer stops without a stop token: the server has its own stop strings")
    if len(ids) > spec.max_new_tokens or (end == "length" and len(ids) != spec.max_new_tokens):
        without = "" if end == "stop" else " without a stop token"
        raise WrongAnswer(f"an answer{without} has {len(ids)} tokens instead of {spec.max_new_tokens}")
    return Completion(list(ids), numbers, end)
