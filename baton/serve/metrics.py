"""Numbers of a server in the text form that Prometheus reads. No torch here."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Histogram:
    """Counts of durations in seconds."""

    def __init__(self) -> None:
        self.counts = [0] * (len(_SECONDS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect_left(_SECONDS, seconds)] += 1
        self.sum += seconds


class Metrics:
    """What has happened since the start. Belongs to the thread that answers requests."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.prompt_tokens = self.completion_tokens = self.disconnects = 0
        self.seconds = Histogram()
        self.first_token = Histogram()

    def text(self, running: int, waiting: int) -> str:
        """Everything, and how many answers are being decoded and how many wait."""
        lines = list(_head("baton_requests_total", "counter", "Requests by route and status."))
        for (route, status), count in sorted(self.requests.items()):
            lines.append(f'baton_requests_total{{route="{route}",status="{status}"}} {count}')
        for name, kind, words, value in (
            ("baton_prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens),
            ("baton_completion_tokens_total", "counter", "Tokens of answers.", self.completion_tokens),
            ("baton_disconnects_total", "counter", "Clients that left before their answer ended.", self.disconnects),
            ("baton_answers_running", "gauge", "Answers that are being decoded.", running),
            ("baton_answers_waiting", "gauge", "Answers that wait for a place.", waiting),
        ):
            lines += [*_head(name, kind, words), f"{name} {value}"]
        lines += _shown("baton_request_seconds", "Time of a request that generates.", self.seconds)
        lines += _shown("baton_first_token_seconds", "Time until a request's first token.", self.first_token)
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, words: str) -> Iterable[str]:
    return f"# HELP {name} {words}", f"# TYPE {name} {kind}"


def _shown(name: str, words: str, found: Histogram) -> list[str]:
    lines, total = list(_head(name, "histogram", words)), 0
    for border, count in zip((*_SECONDS, "+Inf"), found.counts, strict=True):
        total += count
        lines.append(f'{name}_bucket{{le="{border}"}} {total}')
    return [*lines, f"{name}_sum {found.sum:.6f}", f"{name}_count {total}"]
