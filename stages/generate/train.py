"""Generation: a model answers each prompt several times, and all or the best of its answers become rows.

    python -m stages.generate recipes/rejection.yaml

Keeping the best of n answers by a verifier or a reward model, and tuning on them, is rejection sampling (Dong et al.
2023, "RAFT", arXiv:2304.06767; Yuan et al. 2023, arXiv:2308.01825). A row holds a conversation that ends with the
answer, the prompt's own columns, `sample` (the answer's number, from 0) and `stopped`. If the recipe has `scores`, it
also holds `score` (the weighted sum) and `scores` (each entry's own value).

Random numbers are keyed by (seed, section, prompt, sample), so answers do not depend on the number of processes or the
batch size. Answers to finished prompts stay in answers.jsonl until the rows are published; an interrupted stage
continues after them.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.encode import EncodedPrompt, Encoder
from data.errors import DataError
from data.rows import Prompts, Rows
from handoff.files import canonical_hash
from handoff.journal import Journal
from handoff.parent import Parent
from reward.compose import Answers
from rollout.engine import generate
from rollout.positions import check_positions
from rollout.sampling import Completion, SamplingSpec
from stages.generate.config import DECLARATION, Config
from training.limits import within_window
from training.model import Model, load_encoder
from training.precision import answering_dtype
from training.rewards import Scorer, load_rewards, readable, token_readers
from training.run import Run

# Columns of the prompts that the rows do not keep: those that the rows have themselves, and `label`, which a reader of
# conversations would take for a judgement of the new answer.
_OWN = ("messages", "sample", "stopped", "score", "scores", "label")
_CHUNK = 4  # batches that a process decodes per line of the journal
_SHOWN = 8  # rows in samples.jsonl


def train(run: Run) -> None:
    """Runs the stage (it trains nothing; every stage's entry has this name)."""
    config: Config = run.config
    parent = run.parent("parent")
    encoder = load_encoder(parent)

    def opened(ref: str) -> Parent:
        return run.parent(f"reward:{ref}")

    readers = [parent, *token_readers(config.scores, opened)]
    longest = within_window(run, readers, "max_prompt_length", config.max_prompt_length, config.max_new_tokens)
    prompts = run.rows(config.data, Prompts(longest), encoder, "prompts", max_drop_fraction=config.max_drop_fraction)
    prompts = readable(run, config.scores, prompts, "prompts", config.max_drop_fraction)
    left_out = sorted(name for name in prompts.facts if name in _OWN)
    if left_out:
        run.console.print(f"  columns of the prompts that the rows do not keep: {', '.join(left_out)}")

    rewards = None
    if config.scores:
        frozen: list[Model] = []
        composition = load_rewards(
            run.engine,
            config.scores,
            opened,
            [parent],
            prompts,
            config.model_args,
            bf16=False,
            learned={},
            frozen=frozen,
        )
        rewards = Scorer(composition, run.engine, frozen)

    journal = Journal(run.dir.path / DECLARATION.journal)
    completions = _answers(run, parent, encoder, prompts, journal)
    answers = _flat(config, encoder, prompts, completions)
    total, parts = rewards.together(answers) if rewards is not None else (None, {})
    kept, dropped = choose(config, answers.stopped, total)
    for reason, count in dropped.items():
        if count:
            run.console.print(f"  left out, {reason}: {count} of {len(completions)} answers")
    if not kept:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.items())
        raise DataError(
            f"{run.section.name}: none of {len(completions)} answers is left ({reasons}); lower `min_score`, "
            "raise `max_new_tokens`, or set `unfinished: keep`"
        )

    def write(folder: Path | None) -> None:
        if folder is None:
            return
        with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
            for row in _rows(config, answers, total, parts, kept):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    _show(run, answers, total, kept)
    run.publish("dataset", write, _metrics(answers, total, parts, kept, dropped))
    if run.is_main:
        journal.path.unlink(missing_ok=True)


def _answers(
    run: Run, parent: Parent, encoder: Encoder, prompts: Rows[EncodedPrompt], journal: Journal
) -> list[Completion]:
    """`num_generations` answers to each prompt, grouped by prompt, in the prompts' order."""
    config: Config = run.config
    n, engine = config.num_generations, run.engine
    last, found = engine.on_main(lambda: _answered(journal, len(prompts), n))
    missing = [i for i in range(len(prompts)) if i not in found]
    if found:
        run.console.print(f"  {len(found)} of {len(prompts)} prompts were answered before")
    if missing:
        dtype = answering_dtype(engine)
        model = Model.load(
            engine, parent, "policy", encoder, config.model_args, dtype=dtype, bf16=False, frozen=True
        ).freeze()
        truncation = {"top_k": config.top_k, "top_p": config.top_p}
        spec = SamplingSpec.of(encoder, config.max_new_tokens, temperature=config.temperature, **truncation)
        size = max(1, _CHUNK * config.batch_size * engine.data_world // n)  # prompts
        check_positions(model.module, int(prompts.lengths.max()) + config.max_new_tokens)
        with model.whole() as module, run.progress(n * len(prompts), "generate") as advance:
            advance(n * len(found))
            for start in range(0, len(missing), size):
                chunk = missing[start : start + size]
                mine = [(i, j) for i in chunk if engine.owns(i) for j in range(n)]
                made = generate(
                    module,
                    [prompts[i].ids for i, _ in mine],
                    spec,
                    [("generate", run.section.name, i, j) for i, j in mine],
                    run.seed,
                    config.batch_size,
                    advance,
                )
                ordered = engine.join((i * n + j, c) for (i, j), c in zip(mine, made, strict=True))
                found |= {i: ordered[place * n :][:n] for place, i in enumerate(chunk)}
                last += len(chunk)
                if run.is_main:
                    answers = [[c.ids, c.end] for c in ordered]
                    digest = canonical_hash([chunk, answers])
                    journal.append([{"step": last, "prompts": chunk, "answers": answers, "sha256": digest}])
    return [completion for i in range(len(prompts)) for completion in found[i]]


def _answered(journal: Journal, prompts: int, n: int) -> tuple[int, dict[int, list[Completion]]]:
    """(step of the last line, {prompt: its n answers}) from the lines that are whole. The others are cut out."""
    lines = journal.lines()
    last = lines[-1]["step"] if lines else None
    journal.cut(last)
    found: dict[int, list[Completion]] = {}
    for line in lines:
        sealed: Any = [line.get("prompts"), line.get("answers")]
        if line.get("sha256") == canonical_hash(sealed):
            chunk, answers = sealed
            for place, i in enumerate(chunk):
                found[i] = [Completion(ids, [], end) for ids, end in answers[place * n :][:n]]
    assert all(i < prompts and len(made) == n for i, made in found.items()), "the journal is that of another recipe"
    return last or 0, found


def _flat(
    config: Config, encoder: Encoder, prompts: Sequence[EncodedPrompt], completions: Sequence[Completion]
) -> Answers:
    """The answers in the form that rewards take; a prompt is repeated for each of its answers."""
    repeated = [prompt for prompt in prompts for _ in range(config.num_generations)]
    return Answers(
        prompts=[p.record.messages for p in repeated],
        prompt_ids=[p.ids for p in repeated],
        texts=[encoder.decode(c.ids) for c in completions],
        ids=[c.ids for c in completions],
        stopped=[c.end == "stop" for c in completions],
        columns=[p.record.columns for p in repeated],
    )


def choose(config: Config, stopped: Sequence[bool], total: Sequence[float] | None) -> tuple[list[int], dict[str, int]]:
    """(indices of the answers that become rows, in order; number of answers left out, by reason).

    Args:
        stopped: (N,), whether each answer ended with a stop token; the answers to one prompt are adjacent.
        total: (N,) scores; None if the recipe scores nothing.
    """
    dropped = {"unfinished": 0, "below min_score": 0, "not the best": 0}
    kept: list[int] = []
    for start in range(0, len(stopped), config.num_generations):
        rows = list(range(start, start + config.num_generations))
        finished = [i for i in rows if stopped[i] or config.unfinished == "keep"]
        good = [i for i in finished if total is None or config.min_score is None or total[i] >= config.min_score]
        best = good
        if config.keep == "best" and good:
            assert total is not None, "the recipe refuses `keep: best` without scores"
            best = [max(good, key=lambda i: (total[i], -i))]
        dropped["unfinished"] += len(rows) - len(finished)
        dropped["below min_score"] += len(finished) - len(good)
        dropped["not the best"] += len(good) - len(best)
        kept += best
    return kept, dropped


def _rows(
    config: Config,
    answers: Answers,
    total: Sequence[float] | None,
    parts: dict[str, list[float | None]],
    kept: Sequence[int],
) -> Iterator[dict[str, Any]]:
    for i in kept:
        turns = [{"role": m.role, "content": m.content} for m in answers.prompts[i]]
        row: dict[str, Any] = {"messages": [*turns, {"role": "assistant", "content": answers.texts[i]}]}
        row |= {name: value for name, value in answers.columns[i].items() if name not in _OWN}
        row |= {"sample": i % config.num_generations, "stopped": answers.stopped[i]}
        if total is not None:
            row |= {"score": total[i], "scores": {name: values[i] for name, values in parts.items()}}
        yield row


def _show(run: Run, answers: Answers, total: Sequence[float] | None, kept: Sequence[int]) -> None:
    """Writes the first rows to samples.jsonl, for the report."""
    run.rewind(None)
    run.samples(
        0,
        [
            {
                "prompt": "\n".join(m.content for m in answers.prompts[i]),
                "completion": answers.texts[i],
                **({} if total is None else {"score": total[i]}),
            }
            for i in kept[:_SHOWN]
        ],
    )


def _metrics(
    answers: Answers,
    total: Sequence[float] | None,
    parts: dict[str, list[float | None]],
    kept: Sequence[int],
    dropped: dict[str, int],
) -> dict[str, float]:
    """Metrics over all answers; those that begin with `kept/` are over the published rows only."""
    count = len(answers.texts)
    out: dict[str, float] = {
        "rows": len(kept),
        "answers": count,
        "stop_rate": sum(answers.stopped) / count,
        "length_tokens": sum(len(ids) for ids in answers.ids) / count,
        "kept/length_tokens": sum(len(answers.ids[i]) for i in kept) / len(kept),
    }
    if total is not None:
        out |= {"score": sum(total) / count, "kept/score": sum(total[i] for i in kept) / len(kept)}
    for name, values in parts.items():
        known = [value for value in values if value is not None]
        if known:
            out[f"scores/{name}"] = sum(known) / len(known)
    return out | {f"dropped/{reason.replace(' ', '_')}": n for reason, n in dropped.items()}
