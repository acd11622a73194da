"""Errors of the rollout engines. Each message says how to fix the problem."""

from handoff.errors import UserError


class RolloutError(UserError):
    """The engine that the recipe names cannot generate answers."""


class EngineMissing(RolloutError):
    """vLLM cannot be imported or does not start in this process."""


class ServerUnreachable(RolloutError):
    """No server answered within the recipe's `start_timeout`."""


class ConnectionBroken(RolloutError):
    """No server listens at the address, or the connection broke before the answer was complete."""


class ServerTimeout(RolloutError):
    """The server took longer than the recipe allows."""


class ServerRefused(RolloutError):
    """The server refused the request (HTTP 4xx); a retry would not help."""


class ServerFailed(RolloutError):
    """The server failed on the request (HTTP 5xx), or sent a malformed answer."""


class WrongModel(RolloutError):
    """The server serves another model than the one in training, or serves it with unsuitable settings."""


class WrongAnswer(RolloutError):
    """An answer does not match the request: wrong prompt, count, length or end."""


class LogprobsMissing(RolloutError):
    """An answer came without the log-probabilities of its tokens."""


class TransferFailed(RolloutError):
    """The new weights did not reach the engine."""


class StaleWeights(RolloutError):
    """The engine has other weights than those that this run sent last."""
