"""What can go wrong with an engine outside of this process. Each message says what to do about it."""

from handoff.errors import UserError


class RolloutError(UserError):
    """Answers cannot be had from the engine that the recipe names."""


class EngineMissing(RolloutError):
    """vLLM cannot be imported, or does not start, in the process that needs it."""


class ServerUnreachable(RolloutError):
    """No server answered for as long as the recipe waits for one."""


class ConnectionBroken(RolloutError):
    """Nothing listens at the address, or the connection broke before the answer was there."""


class ServerTimeout(RolloutError):
    """The server took longer than the recipe allows."""


class ServerRefused(RolloutError):
    """The server understood the request and will not do it (HTTP 4xx): asking again is no use."""


class ServerFailed(RolloutError):
    """The server broke down over the request (HTTP 5xx), or answered what nobody can read."""


class WrongModel(RolloutError):
    """The server serves another model than the one trained, or serves it otherwise than training needs."""


class WrongAnswer(RolloutError):
    """An answer is not what was asked for: other prompt, wrong count, wrong length, another end."""


class LogprobsMissing(RolloutError):
    """An answer came without the log-probabilities of its tokens."""


class TransferFailed(RolloutError):
    """The new weights did not reach the engine."""


class StaleWeights(RolloutError):
    """The engine has other weights than those that this run gave it last."""
