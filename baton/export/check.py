"""Whether an export answers as the stage did."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from baton.export import llama_cpp, probes
from baton.export.answers import Answers, Difference, answers_of, difference
from handoff.errors import HandoffError
from handoff.files import quoted, sha256_file

if TYPE_CHECKING:
    from data.encode import Encoder
    from training.model import Model

LEAST_AGREEMENT = 0.99
# {precision: (largest mean |Δ log p|, largest |Δ log p| of one position)}. llama.cpp rounds to 16 bits what it
# multiplies with 16-bit weights.
LIMITS = {"f32": (1e-3, 1e-2), "f16": (1e-2, 5e-2), "bf16": (5e-2, 1.0)}


class CheckFailed(HandoffError):
    """An export does not answer as the stage did."""


@dataclass
class Expected:
    """What the stage's model says to the probes."""

    encoder: "Encoder"
    rows: list[list[int]]
    question: list[int]
    answers: Answers

    @classmethod
    def of(cls, model: "Model") -> "Expected":
        """Asks a loaded model."""
        rows, question = probes.rows(model.encoder), probes.question(model.encoder)
        with model.whole() as module:
            found = answers_of(module, model.encoder, rows, question, probes.ANSWER)
        return cls(model.encoder, rows, question, found)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """The stage's tokens of these texts."""
        backend = self.encoder.tokenizer.backend_tokenizer
        return [found.ids for found in backend.encode_batch(list(texts), add_special_tokens=False)]


@dataclass
class Verdict:
    """What a check has found."""

    by: str
    """What read the export."""
    said: list[str] = field(default_factory=list)
    """In sentences, for a person."""
    numbers: dict[str, float | int | bool] = field(default_factory=dict)

    def add(self, found: Difference) -> None:
        """Adds the differences of answers."""
        self.said.append(found.told())
        self.numbers |= {
            "positions": found.positions,
            "agreement": found.agreement,
            "largest_difference": found.largest,
            "mean_difference": found.mean,
            "loss": found.loss,
        }


def check_hf(folder: Path, expected: Expected, dtype: str) -> Verdict:
    """Reads a model directory as transformers does."""
    return _by_transformers(folder, expected, dtype, probes.strings(expected.encoder))


def _by_transformers(folder: Path, expected: Expected, dtype: str, texts: Sequence[str]) -> Verdict:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from training.architecture import LOCAL

    verdict = Verdict("transformers")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, **LOCAL)
    _same_tokens(verdict, texts, expected.tokens(texts), tokenizer(list(texts), add_special_tokens=False).input_ids)
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **LOCAL)
    stops = module.generation_config.eos_token_id
    _same_stops(expected, [stops] if isinstance(stops, int) else stops or [])
    answers = answers_of(module, expected.encoder, expected.rows, expected.question, probes.ANSWER)
    _compare(verdict, expected, answers, dtype)
    return verdict


def check_gguf(file: Path, expected: Expected, dtype: str, *, composes: bool) -> Verdict:
    """Asks llama.cpp if it is here, otherwise reads the file back with transformers. `composes`: see `Vocabulary`."""
    llama = llama_cpp.find()
    texts = probes.strings(expected.encoder, composed=composes)
    if isinstance(llama, str):
        verdict = _read_back(file, expected, dtype, texts)
        verdict.said.insert(0, f"llama.cpp was not asked ({llama}); transformers has read the file back")
        return verdict
    verdict = Verdict(f"llama.cpp (node-llama-cpp {llama.version})")
    heard = llama_cpp.ask(
        llama, file, texts, expected.rows, expected.question, probes.ANSWER, expected.encoder.stop_ids
    )
    _same_tokens(verdict, texts, expected.tokens(texts), heard.tokens)
    _same_stops(expected, [stop for stop in expected.encoder.stop_ids if stop not in heard.unknown_stops])
    _compare(verdict, expected, heard.answers, dtype)
    return verdict


def _read_back(file: Path, expected: Expected, dtype: str, texts: Sequence[str]) -> Verdict:
    from handoff.gguf import unpacked

    with TemporaryDirectory(dir=file.parent, prefix=".read-back-") as store:
        return _by_transformers(unpacked(file, Path(store), sha256_file(file)), expected, dtype, texts)


def _same_tokens(
    verdict: Verdict, texts: Sequence[str], wanted: Sequence[Sequence[int]], found: Sequence[Sequence[int]]
) -> None:
    wrong = [place for place, (one, other) in enumerate(zip(wanted, found, strict=True)) if list(one) != list(other)]
    if wrong:
        first = wrong[0]
        raise CheckFailed(
            f"{verdict.by} cuts {len(wrong)} of {len(texts)} texts into other tokens, e.g. "
            f"{quoted(repr(texts[first]))}: {list(wanted[first])[:12]} and {list(found[first])[:12]}"
        )
    verdict.said.append(f"{len(texts)} of {len(texts)} texts have the same tokens")
    verdict.numbers["texts"] = len(texts)


def _same_stops(expected: Expected, found: Sequence[int]) -> None:
    lacking = sorted(set(expected.encoder.stop_ids) - set(found))
    if lacking:
        raise CheckFailed(f"an answer would not end at the stop ids {lacking}")


def _compare(verdict: Verdict, expected: Expected, found: Answers, dtype: str) -> None:
    gap = difference(expected.answers, found)
    verdict.add(gap)
    if expected.answers.ended:
        if not found.ended and (dtype in LIMITS):
            raise CheckFailed(f"{verdict.by} does not end an answer that the stage's model ended")
        same = "with the same tokens" if found.answer == expected.answers.answer else "with other tokens"
        verdict.said.append(f"an answer ends by itself, {same}" if found.ended else "an answer did not end by itself")
        verdict.numbers["ended"] = found.ended
    else:
        verdict.said.append("whether answers end was not compared: the stage's own does not end, or has no template")
    if dtype in LIMITS:
        mean, largest = LIMITS[dtype]
        if gap.agreement < LEAST_AGREEMENT or not (gap.mean <= mean and gap.largest <= largest):
            raise CheckFailed(
                f"{verdict.by} answers otherwise than the stage: {gap.told()}; at {dtype}, {100 * LEAST_AGREEMENT:.0f} "
                f"%, {mean:g} and {largest:g} are the limits"
            )
    elif not gap.mean < float("inf"):
        raise CheckFailed(f"{verdict.by} gives probabilities that are no numbers")
