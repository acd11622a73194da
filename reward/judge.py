"""A reward from a judge model at any endpoint with OpenAI's chat completions API (GPT, Claude, Gemini, vLLM, ...).

In a recipe, with every option of `JudgeConfig` under `args:` (docs/judge.md has an entry for each provider):

    reward:
      - {function: judge, args: {base_url: "https://api.openai.com/v1", model: ..., cache_dir: runs/judge}}

`rubric` grades an answer. `pairwise` compares it with a reference answer in both orders, and counts a tie when the two
orders disagree, because judges favour a position (Zheng et al. 2023, arXiv:2306.05685, section 4). An unanswered
question, a refusal or a reply without a verdict gives None and is counted; too many of them stop the run.
"""

import inspect
import logging
import math
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.records import Message
from handoff.files import canonical_hash
from reward import judge_text
from reward.functions import RewardError
from reward.judge_cache import Cache
from reward.judge_client import Client, Key, Reply, Tally, Unanswered
from reward.judge_config import JudgeConfig, read_options

_log = logging.getLogger(__name__)
_SAMPLES = 3
_PAIRS_TO_TELL = 8  # with fewer pairs, disagreement says nothing about a position bias

_COUNTED = (
    *("rows", "rows_without_verdict", "questions", "cache_hits", "verdicts", "refusals", "nonsense", "failures"),
    *("requests", "repeated", "input_tokens", "output_tokens", "cost"),
    *("pairs", "disagreements", "chose_first", "chose_second"),
)
_statistics: dict[tuple[str, str], Tally] = {}
_bought: dict[tuple[str, str], Tally] = {}  # tokens, never reset


@dataclass(frozen=True)
class Verdict:
    """The result of one question: a value in [0, 1], or None and what the judge said instead."""

    value: float | None
    kind: Literal["verdicts", "refusals", "nonsense", "failures"]
    said: str


def judge_statistics() -> dict[tuple[str, str], dict[str, float]]:
    """This process's counts since the last reset, by (base_url, model). All are sums, so they add up over processes.

    `rows`: rows judged, of which `rows_without_verdict` got none. `questions`: one per row, two in pairwise mode, of
    which `cache_hits` were answered from disk or by an equal question in the same call. `verdicts`, `refusals`,
    `nonsense`, `failures`: how the questions ended. `requests`: attempts sent, of which `repeated` were retries.
    `input_tokens`, `output_tokens`, `cost`: of the answers paid for. `pairs`: pairs with a verdict in both orders, of
    which in `disagreements` the orders differ. `chose_first`, `chose_second`: verdicts of pairs by position; an
    unbiased judge has about equal numbers of both.
    """
    return {endpoint: tally.sums() for endpoint, tally in _statistics.items()}


def reset_judge_statistics() -> None:
    """Resets the counts, except the tokens that count towards `max_cost`."""
    _statistics.clear()


def judge(prompts: Sequence[tuple[Message, ...]], completions: Sequence[str], **arguments: Any) -> list[float | None]:
    """Scores in [0, 1], from a judge's verdicts. `arguments`: the options of `JudgeConfig`, and the data's columns.

    Raises RewardError for an unknown or missing option or one out of range, a missing column or key, an endpoint that
    would reject every question (see reward/judge_client.py), a cost of `max_cost` or more, and too many rows without a
    verdict (the message quotes some of the replies).
    """
    config, columns = read_options(arguments, len(completions))
    key = _key(config)
    rows = _questions(config, prompts, completions, columns)
    keys = [[canonical_hash(config.body(question.messages)) for question in row] for row in rows]
    questions = {
        name: each for names, row in zip(keys, rows, strict=True) for name, each in zip(names, row, strict=True)
    }
    endpoint = (config.base_url, config.model)
    tally = _statistics.setdefault(endpoint, Tally(*_COUNTED))
    count = sum(map(len, rows))
    tally.add(rows=sum(map(bool, rows)), questions=count, cache_hits=count - len(questions))
    with ExitStack() as stack:
        cache = None
        if config.cache_dir is not None:
            cache = stack.enter_context(closing(Cache(Path(config.cache_dir).expanduser())))
        client = Client(
            config.base_url,
            config.model,
            key,
            tally,
            concurrency=config.concurrency,
            timeout=config.timeout,
            retries=config.retries,
            backoff=config.backoff,
        )
        stack.enter_context(closing(client))
        pool = ThreadPoolExecutor(config.concurrency, "judge")
        stack.callback(pool.shutdown, cancel_futures=True)
        stack.callback(client.stop)
        desk = _Desk(config, client, cache, tally, _bought.setdefault(endpoint, Tally("read", "written")))
        replies = {pool.submit(desk.reply, name, each.messages): name for name, each in questions.items()}
        verdicts = _collect(config, questions, replies, keys, tally)
    values = [[verdicts[name].value for name in row] for row in keys]
    if config.mode == "rubric":
        return [row[0] if row else None for row in values]
    return _compare_orders(config, values, tally)


# reward/compose.py reads a function's `args` from its signature: here those of JudgeConfig, and any column.
_own = inspect.signature(judge).parameters
vars(judge)["__signature__"] = inspect.Signature(
    [_own["prompts"], _own["completions"], *inspect.signature(JudgeConfig).parameters.values(), _own["arguments"]]
)


def _key(config: JudgeConfig) -> Key | None:
    if config.api_key_env is None:
        return None
    secret = os.environ.get(config.api_key_env, "").strip()
    if not secret or not secret.isascii() or not secret.isprintable():
        raise RewardError(
            f"judge: the environment variable {config.api_key_env} holds no key for {config.base_url}: export it, "
            "or set `api_key_env` to the variable that holds the key (null if the endpoint needs none)"
        )
    return Key(secret, config.api_key_env)


def _questions(
    config: JudgeConfig,
    prompts: Sequence[tuple[Message, ...]],
    completions: Sequence[str],
    columns: dict[str, Sequence[Any]],
) -> list[list[judge_text.Question]]:
    """The questions about each row: one, or two in pairwise mode (the answer first, then the reference first), or none
    if the row has no reference."""
    name = config.reference_column or ("answer" if config.mode == "pairwise" else None)
    if name is not None and name not in columns:
        raise RewardError(
            f"judge: the data has no column `{name}` with reference answers: set `reference_column` to one of "
            f"{', '.join(sorted(columns)) or 'its columns (it has none)'}"
        )
    references = columns[name] if name is not None else [None] * len(completions)
    rubrics = columns.get("rubric", [None] * len(completions))
    rows: list[list[judge_text.Question]] = []
    for i, (prompt, answer, reference, own) in enumerate(zip(prompts, completions, references, rubrics, strict=True)):
        for column, value in ((name, reference), ("rubric", own)):
            if value is not None and not isinstance(value, str):
                raise RewardError(f"judge: column `{column}`, row {i} of the call: {value!r} is not text")
        rubric = own or config.rubric
        if name is not None and reference is None:
            rows.append([])
        elif config.mode == "pairwise":
            assert reference is not None
            orders = ((answer, reference), (reference, answer))
            rows.append([judge_text.comparison(prompt, first, second, rubric) for first, second in orders])
        else:
            rows.append([judge_text.grading(prompt, answer, reference, rubric, config.lowest, config.highest)])
    return rows


class _Desk:
    """Gives threads the reply to a question, from the cache or from the endpoint, and enforces `max_cost`."""

    def __init__(self, config: JudgeConfig, client: Client, cache: Cache | None, tally: Tally, bought: Tally) -> None:
        self._config = config
        self._client = client
        self._cache = cache
        self._tally = tally
        self._bought = bought

    def reply(self, name: str, messages: list[dict[str, str]]) -> Reply:
        """The reply to the question with the hash `name`. Raises Unanswered or RewardError."""
        known = None if self._cache is None else self._cache.get(name)
        if known is not None:
            self._tally.add(cache_hits=1)
            return known
        self._check_cost()
        reply = self._client.ask(self._config.body(messages))
        kept = reply if self._cache is None else self._cache.put(name, self._config.model, reply)
        if reply.tokens is not None:
            read, written = reply.tokens
            self._bought.add(read=read, written=written)
            self._tally.add(input_tokens=read, output_tokens=written, cost=self._config.cost(read, written))
        elif self._config.max_cost is not None and reply.finish != "content_filter":
            raise RewardError(f"judge {self._config.base_url} does not say how many tokens it used: remove `max_cost`")
        return kept

    def _check_cost(self) -> None:
        if self._config.max_cost is None:
            return
        read: float
        written: float
        if self._cache is not None:
            read, written = self._cache.tokens(self._config.model)
        else:
            bought = self._bought.sums()
            read, written = bought["read"], bought["written"]
        cost = self._config.cost(read, written)
        if cost >= self._config.max_cost:
            raise RewardError(
                f"judge `{self._config.model}` has cost {cost:.4g} ({read:.0f} tokens in, {written:.0f} out), and "
                f"`max_cost` is {self._config.max_cost:g}: raise it to continue"
            )


def _collect(
    config: JudgeConfig,
    questions: dict[str, judge_text.Question],
    replies: dict[Future[Reply], str],
    rows: list[list[str]],
    tally: Tally,
) -> dict[str, Verdict]:
    """The verdict on every question. Raises RewardError as soon as too many rows have none."""
    owners: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        for name in row:
            owners.setdefault(name, []).append(i)
    judged = sum(map(bool, rows))
    allowed = 0 if config.on_failure == "error" else math.ceil(config.max_failure_fraction * judged)
    verdicts: dict[str, Verdict] = {}
    failed: set[int] = set()
    samples: list[str] = []
    for future in as_completed(replies):
        name = replies[future]
        try:
            verdicts[name] = verdict = _read(config, questions[name], future.result())
        except Unanswered as error:
            verdicts[name] = verdict = Verdict(None, "failures", str(error))
        tally.add(**{verdict.kind: len(owners[name])})
        if verdict.value is None:
            tally.add(rows_without_verdict=len(set(owners[name]) - failed))
            failed.update(owners[name])
            samples.append(f"{verdict.kind}: {verdict.said}")
            if len(failed) > allowed:
                raise RewardError(
                    f"judge `{config.model}` at {config.base_url}: {len(failed)} of {judged} rows without a verdict, "
                    f"{allowed} allowed (`on_failure`, `max_failure_fraction`). It said:\n  "
                    + "\n  ".join(dict.fromkeys(samples[-_SAMPLES:]))
                )
    if failed:
        _log.warning(
            "judge `%s`: %d of %d rows without a verdict, e.g. %s", config.model, len(failed), judged, samples[0]
        )
    return verdicts


def _read(config: JudgeConfig, question: judge_text.Question, reply: Reply) -> Verdict:
    said = repr(reply.refusal or reply.text[-300:])
    if reply.refusal or reply.finish.startswith(("content_filter", "refusal")):
        return Verdict(None, "refusals", f"{said} (finish_reason {reply.finish or 'not given'})")
    if reply.finish == "length":  # a JSON object in a truncated reply may be a quotation
        return Verdict(None, "nonsense", f"{said}, cut off: raise `max_tokens` under `request`")
    text = question.verdict_of(reply.text)
    if config.mode == "rubric":
        value = judge_text.read_score(text, config.lowest, config.highest)
    else:
        value = judge_text.read_winner(text)
    if value is not None:
        return Verdict(value, "verdicts", said)
    return Verdict(None, "refusals" if judge_text.refuses(text) else "nonsense", said)


def _compare_orders(config: JudgeConfig, values: list[list[float | None]], tally: Tally) -> list[float | None]:
    """Combines each row's two verdicts into one, and counts how often the two orders disagree."""
    out: list[float | None] = []
    both, differ, first, second = 0, 0, 0, 0
    for row in values:
        if not row or row[0] is None or row[1] is None:
            out.append(None)
            continue
        answer_first, reference_first = row[0], row[1]
        both += 1
        differ += answer_first != 1 - reference_first
        first += row.count(1.0)
        second += row.count(0.0)
        out.append(answer_first if answer_first == 1 - reference_first else 0.5)
    tally.add(pairs=both, disagreements=differ, chose_first=first, chose_second=second)
    if both >= _PAIRS_TO_TELL and 2 * differ > both:
        _log.warning(
            "judge `%s` disagreed with itself on %d of %d pairs when their order was swapped (it chose the first %d "
            "times, the second %d times). Disagreements count as ties, so this judge gives little training signal",
            *(config.model, differ, both, first, second),
        )
    return out
