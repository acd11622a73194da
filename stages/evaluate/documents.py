"""Tasks of kind `documents`: bits a byte, and perplexity, of text that the models read."""

from collections.abc import Callable, Iterator, Sequence

from transformers import PreTrainedModel

from data.records import Message, Text
from data.rows import Texts
from stages.evaluate import likelihood
from stages.evaluate.answers import Answer
from stages.evaluate.part import Subject, TaskPart
from stages.evaluate.statistics import Items
from stages.evaluate.tasks import DocumentsTask
from training.limits import within_window
from training.run import Run

_SHOWN = 200
"""Characters of a document that are kept beside its numbers."""


class DocumentsPart(TaskPart[DocumentsTask]):
    """One task of kind `documents`."""

    def __init__(self, run: Run, number: int, task: DocumentsTask, subjects: Sequence[Subject]) -> None:
        super().__init__(run, number, task, subjects)
        parents = [subject.parent for subject in subjects]
        self.context = within_window(run, parents, f"tasks.{number}.context_length", task.context_length)
        self.texts = [text for part in run.rows(task.data, Texts(Text), label=task.name) for text in part]
        self.keys = [None] * len(self.texts)
        self.nats: dict[str, list[float]] = {}
        self.tokens: dict[str, list[int]] = {}

    def measure(self, subject: Subject, model: PreTrainedModel, advance: Callable[[int], None]) -> None:
        """Nats of each document. Each process reads its share, then all processes get all numbers."""
        mine = self.run.engine.share(len(self.texts))
        texts, encoder = [self.texts[i] for i in mine], subject.encoder
        nats = likelihood.of_documents(model, encoder, texts, self.context, self.batch_size)
        counts = [len(ids[encoder.text_part]) for ids in encoder.documents(texts)]
        found = self.run.engine.join([(i, (-a, b)) for i, a, b in zip(mine, nats, counts, strict=True)])
        self.nats[subject.name] = [a for a, _ in found]
        self.tokens[subject.name] = [b for _, b in found]

    def items(self) -> dict[str, dict[str, Items]]:
        """Bits and bytes, nats and tokens of each document."""
        sizes = [len(text.encode()) for text in self.texts]
        return {
            model: {
                "bits_per_byte": Items([value * likelihood.BITS for value in nats], sizes),
                "perplexity": Items(nats, self.tokens[model], exponent=True),
            }
            for model, nats in self.nats.items()
        }

    def about(self) -> str:
        """How many documents are read, and in what pieces."""
        return f"{self.count} documents, read {self.context} tokens at once"

    def answers(self) -> Iterator[Answer]:
        """The likelihood of every document under every model."""
        for model, nats in self.nats.items():
            for i, text in enumerate(self.texts):
                yield Answer(
                    task=self.task.name,
                    item=i,
                    model=model,
                    kind="document",
                    prompt=[Message("user", text if len(text) <= _SHOWN else text[:_SHOWN] + "…")],
                    scores={"bits_per_byte": nats[i] * likelihood.BITS / len(text.encode())},
                    tokens=self.tokens[model][i],
                    log_likelihoods=[-nats[i]],
                )
