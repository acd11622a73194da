"""What a section costs: memory of one process, disk, tokens, FLOPs, time. Pure arithmetic; no torch, nothing is loaded.

Memory is counted in phases: the training pass, the optimizer's step, forward passes without gradients, sampling. What
is held in all of them (weights, the optimizer's state, the process itself) is counted once; the largest phase gives the
peak. docs/plan.md has the formulas, and how far they are from what was measured.

Legend: T tokens of a pass, C hidden size, I width of the feed-forward layer, V vocabulary, Hq query heads, H key and
value heads, D head size. Activations are what autograd keeps of a layer for the backward pass, in numbers a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from handoff.manifest import QuantizationRecord
from training.declaration import HeldModel, Role
from training.devices import Device
from training.engines.launch import Request
from training.engines.shares import Shares, frozen, in_its_precision, process, trained
from training.shapes import Shape
from training.work import Batch, Rollout, Work

_TILE = (4096, 32768)
"""Tokens and entries of the vocabulary of one tile of logits, in TRL's fused output head."""
_PIECE = 2**22
"""Logits that are turned into log-probabilities at once where there are no gradients (`rollout.logprobs`)."""
_PREFILL = {"cpu": 512, "cuda": 8192}
_ADAM, _MUON = 8.0, 4.0
_WITH_SCORES = ("gemma2",)
"""Families whose attention keeps the scores of all pairs of tokens."""
_MORE = {"phi3": 2, "gpt_neox": 2, "opt": 2}
"""Further tensors of the queries' width that a family's attention keeps."""
_GAPS = (0.7, 0.6)
"""Gaps between gradients, and between activations, as shares of their size; fitted to measured peaks."""
_GAPS_OF_ADAPTERS = (0.8, 1.8)
"""Gaps between activations where an adapter is trained, whose layers make short-lived tensors between those that are
kept: if all passes have rows of the same size, and otherwise."""
_PASSING = ("activations", "logits", "cache")
FAMILIES_DECODED = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose weights are packed once more for sampling on a CPU (`rollout.lean`)."""


@dataclass(frozen=True)
class Settings:
    """The keys of a recipe on which a section's memory depends."""

    bf16: bool = False
    """Whether forward passes run in bfloat16 over float32 weights."""
    checkpointing: bool = False
    width: int = 4
    """Bytes of a number of the trained weights."""
    published: int = 4
    """Bytes of a number of the published weights, if they are not an adapter's."""
    muon: bool = False
    checkpointed: tuple[Role, ...] = ("policy", "critic", "reward")
    """Models whose activations `checkpointing` recomputes."""
    correction: float = 1.0
    """Factor of what comes and goes (activations, logits, cache), by which a measured peak differs from the formula."""


@dataclass(frozen=True)
class Held:
    """A model that a process has in memory."""

    model: HeldModel
    shape: Shape
    headless: bool
    """Whether it has no output head, as critics and reward models."""
    adapter: int | None = None
    """Parameters of the adapter that is trained in place of its weights; None: it has none."""
    width: int = 4
    """Bytes of a number of the weights that are frozen: of all, or of those below an adapter."""
    shared: bool = False
    """Whether its weights below an adapter are those of the section's policy."""
    quantization: QuantizationRecord | None = None
    """How its frozen weights are quantised."""

    @property
    def parameters(self) -> int:
        """All its parameters."""
        return self.shape.body + self.shape.hidden + 1 if self.headless else self.shape.parameters

    def frozen_bytes(self, width: int) -> float:
        """Bytes of its weights while they are frozen. `width`: bytes of a number that is not quantised."""
        if self.quantization is None:
            return width * self.parameters
        matrices = self.shape.layers * self.shape.matrices
        return width * (self.parameters - matrices) + _bytes_of_a_weight(self.quantization, self.shape) * matrices

    @property
    def trained(self) -> int:
        """Its parameters that are trained; a new head is, beside an adapter."""
        if not self.model.trained:
            return 0
        return self.parameters if self.adapter is None else self.adapter + self.headless * (self.shape.hidden + 1)


def _bytes_of_a_weight(record: QuantizationRecord, shape: Shape) -> float:
    """Bytes that a quantised weight takes with its share of the scales."""
    if record.method == "int8":
        return 1 + 4 / shape.hidden  # a scale for each row of a matrix
    # A scale for 64 weights; with double quantisation it is one byte, and 256 of them have a scale of their own.
    return 0.5 + (1 / 64 + 4 / (64 * 256) if record.double_quant else 4 / 64)


@dataclass(frozen=True)
class Memory:
    """Bytes of one process in one phase."""

    phase: str
    weights: float = 0.0
    optimizer: float = 0.0
    gradients: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    cache: float = 0.0
    """Keys and values of answers that are being sampled, and weights that are packed for it."""
    exchange: float = 0.0
    """Weights of other processes, and buffers for exchanging gradients."""
    process: float = 0.0
    allocator: float = 0.0
    """Pages of freed tensors that the allocator has not given back; on CPUs."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.parts().values())

    @property
    def passing(self) -> float:
        """What comes and goes within a phase."""
        return sum(value for key, value in self.parts().items() if key in _PASSING)

    def corrected(self, factor: float) -> "Memory":
        """With what comes and goes multiplied by a factor."""
        found: dict[str, Any] = {key: factor * value for key, value in self.parts().items() if key in _PASSING}
        return replace(self, **found)

    def parts(self) -> dict[str, float]:
        """{part: bytes}."""
        return {key: value for key, value in vars(self).items() if key != "phase"}


@dataclass(frozen=True)
class Cost:
    """What one section costs."""

    phases: list[Memory]
    disk: float
    """Bytes of saved states and of what is published."""
    tokens: float | None
    """Tokens that the training reads, over all processes; None: the number of rows is not known."""
    flops: float | None
    micro_batch: int
    accumulation: int

    @property
    def peak(self) -> Memory:
        """The phase with the most memory."""
        return max(self.phases, key=lambda phase: phase.total)

    def seconds(self, device: Device, processes: int, utilisation: float) -> float | None:
        """Time at a share of the device's peak FLOP/s; None if either is not known."""
        if self.flops is None or device.flops is None:
            return None
        return self.flops / (device.flops * processes * utilisation)


def cost(
    held: Sequence[Held],
    work: Work,
    settings: Settings,
    request: Request,
    device: Device,
    micro_batch: int,
    rows: int | None,
) -> Cost:
    """What a section costs.

    Args:
        held: the models of one process.
        work: what the stage says.
        settings: how it trains.
        request: the engine and the number of processes.
        device: what each process runs on.
        micro_batch: rows of one training pass of one process.
        rows: rows of the whole training; None if that is not known.
    """
    accumulation = max(1, work.batch // (micro_batch * request.processes))
    base = _base(held, settings, request, device)
    phases: list[Memory] = []
    if work.train is not None:
        phases += _training(held, replace(work.train, rows=micro_batch), settings, request, device, accumulation, base)
    whole = sum(shares.whole for _, shares in _shares(held, settings, request))
    if work.measure is not None:
        phases.append(_forward(held, work.measure, settings, device, base, whole))
    if work.rollout is not None:
        phases.append(_sampling(held, work.rollout, settings, device, base, whole))
    phases = [phase.corrected(settings.correction) for phase in phases] or [base]
    published = max((one.trained * (settings.published if one.adapter is None else 4.0) for one in held), default=0.0)
    saved = sum(one.trained * (_width(one, settings) + _moments(one, settings)) for one in held)
    tokens = None if rows is None else rows * work.row_tokens * work.passes
    flops = _flops(held, work, settings, rows)
    return Cost(phases, work.states * saved + published, tokens, flops, micro_batch, accumulation)


# ---- what is held all the time


def _width(one: Held, settings: Settings) -> int:
    """Bytes of a number of what is trained; an adapter is float32, whatever the weights below it are."""
    return settings.width if one.adapter is None else 4


def _moments(one: Held, settings: Settings) -> float:
    """Bytes of the optimizer's state for one parameter. Muon keeps one number of a matrix, AdamW two of anything."""
    return (_MUON if settings.muon else _ADAM) * _width(one, settings) / 4


def _shares(held: Sequence[Held], settings: Settings, request: Request) -> list[tuple[Held, Shares]]:
    together = sum(one.trained for one in held)
    result = []
    for one in held:
        if not one.model.trained:
            result.append((one, frozen(request, 0.0 if one.shared else one.frozen_bytes(one.width))))
            continue
        outside = one.parameters - one.shape.layers * one.shape.layer
        largest = outside + 2 * one.shape.layer
        width, moments = _width(one, settings), _moments(one, settings)
        shares = trained(request, one.trained, largest, width, moments, settings.bf16, together)
        below = 0.0 if one.adapter is None or one.shared else one.frozen_bytes(one.width)
        rest = frozen(request, below)
        result.append((one, replace(shares, weights=shares.weights + rest.weights, whole=shares.whole + rest.whole)))
        if settings.muon:  # embeddings and norms are AdamW's
            odd = one.parameters - one.shape.layers * one.shape.matrices
            result[-1] = (one, replace(result[-1][1], optimizer=shares.optimizer + _MUON * odd))
    return result


def _base(held: Sequence[Held], settings: Settings, request: Request, device: Device) -> Memory:
    shares = [found for _, found in _shares(held, settings, request)]
    return Memory(
        "loading",
        weights=sum(one.weights for one in shares),
        optimizer=sum(one.optimizer for one in shares),
        process=device.base + process(request),
    )


# ---- training


def activations(shape: Shape, batch: Batch, settings: Settings, device: Device) -> float:
    """Bytes that autograd keeps for the backward pass of a whole model, without the output head."""
    tokens = batch.tokens
    layer = tokens * layer_bytes(shape, batch, settings, device)
    final = tokens * _norm_bytes(shape, settings)
    if settings.checkpointing:
        return shape.layers * tokens * 4 * shape.hidden + layer + final
    return shape.layers * layer + final


def layer_bytes(shape: Shape, batch: Batch, settings: Settings, device: Device) -> float:
    """Bytes that autograd keeps of one token in one layer."""
    number = 2 if settings.bf16 else 4
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 2 * _norm_bytes(shape, settings) + (shape.norms - 2) * 8 * shape.hidden
    repeated = queries if batch.padded else keys  # with a mask, each query head gets a copy of its keys and values
    kept = number if batch.padded or device.kind == "cuda" else 4
    attention = kept * (2 * queries + 2 * repeated) + 4 * shape.heads + 4
    if batch.padded and device.kind == "cpu":
        attention += 4 * batch.length  # each layer turns the mask into numbers
    if shape.family in _WITH_SCORES:
        attention += 8 * shape.heads * batch.length
    attention += number * _MORE.get(shape.family, 0) * queries
    if not batch.padded and batch.head == "actions":  # rows without padding are put together again
        attention += number * queries
    if shape.qk_norm:
        attention += (6 if settings.bf16 else 8) * (queries + keys)
    used = max(1, shape.experts_used)
    wide = number * shape.intermediate * _kept_of_feed_forward(shape)
    if shape.experts:
        wide += number * 3 * shape.hidden
    return norms + attention + used * wide


def _kept_of_feed_forward(shape: Shape) -> int:
    """How many tensors of width I a feed-forward layer keeps."""
    return 4 if shape.gated else {"gpt2": 5, "opt": 1}.get(shape.family, 2)


def _norm_bytes(shape: Shape, settings: Settings) -> float:
    """Bytes that a norm and the linear layers after it keep of one token."""
    kept = 1 if shape.norm_bias else 2  # RMSNorm keeps its input and the normalised one
    return (4 * kept + (2 if settings.bf16 else 4)) * shape.hidden


def _training(
    held: Sequence[Held],
    batch: Batch,
    settings: Settings,
    request: Request,
    device: Device,
    accumulation: int,
    base: Memory,
) -> list[Memory]:
    shares = [(one, found) for one, found in _shares(held, settings, request) if one.model.trained]
    gradients = sum(found.gradients for _, found in shares)
    base = replace(base, exchange=sum(found.live for _, found in shares))
    kept = {one.model.role: _kept(one, batch, settings, request, device) for one, _ in shares}
    shape = max((one.shape for one, _ in shares), key=lambda shape: shape.hidden * shape.layers)
    working = _working(shape, batch.tokens, settings) + _dequantised(held)
    embedding = max(4.0 * one.shape.embedding * (one.adapter is None) for one, _ in shares)
    before = gradients if accumulation > 1 else sum(found.lasting for _, found in shares)
    # Everything has been computed; the backward pass begins, with the model that was computed last.
    log_probs = 4.0 * batch.logits * shape.vocab if batch.head != "tiles" else 0.0
    phases = [
        replace(
            base, phase="forward pass", activations=sum(kept.values()) + working, logits=log_probs, gradients=before
        )
    ]
    if batch.logits:
        # The output head: of the policy, after the backward pass of a critic.
        others = sum(found.gradients for one, found in shares if one.headless)
        phases.append(
            replace(
                base,
                phase="output head",
                activations=sum(size for role, size in kept.items() if role == "policy"),
                logits=_logits(shape, batch, settings, device),
                gradients=max(before, others) + embedding,
            )
        )
    # The gradient of the embedding is a tensor of its own before it is added to that of the output head.
    last = gradients + (embedding if batch.logits else 0.0)
    phases.append(replace(base, phase="optimizer step", gradients=last, activations=working))
    if device.kind == "cuda":
        return phases
    # glibc gives tensors back that are as large as the largest that were freed, such as logits and the gradients of
    # embeddings. The memory of smaller ones stays with the process, and tensors of other sizes do not fill its gaps.
    gaps = _GAPS[1]
    if any(one.adapter is not None for one, _ in shares):
        gaps = _GAPS_OF_ADAPTERS[batch.head == "actions"]
    kept_pages = max(
        max(0.0, one.gradients - 2 * embedding) * (1 + _GAPS[0]) + one.activations * (1 + gaps) for one in phases
    )
    return [
        replace(one, allocator=kept_pages - max(0.0, one.gradients - 2 * embedding) - one.activations) for one in phases
    ]


def _kept(one: Held, batch: Batch, settings: Settings, request: Request, device: Device) -> float:
    """Bytes that autograd keeps of a model's forward pass."""
    if one.model.role not in settings.checkpointed:
        settings = replace(settings, checkpointing=False)
    kept = activations(one.shape, batch, settings, device)
    cast = settings.width if one.adapter is None else one.width
    if settings.bf16 and cast == 4 and one.quantization is None and not in_its_precision(request):
        # Autocast keeps a bfloat16 copy of each linear layer's weights until the backward pass has used it.
        kept += 2.0 * one.shape.layers * one.shape.matrices
    return kept


def _working(shape: Shape, tokens: int, settings: Settings) -> float:
    """Bytes of the tensors that one layer has at once while it computes."""
    number = 2 if settings.bf16 else 4
    used = max(1, shape.experts_used)
    return tokens * (8.0 * shape.hidden + number * max(3 * used * shape.intermediate, shape.attention_width))


def _dequantised(held: Sequence[Held]) -> float:
    """Bytes of a quantised layer's weights while it computes: it turns them into float32 each time."""
    copies = {"nf4": 1, "int8": 2}
    used = [(one.shape, copies[one.quantization.method]) for one in held if one.quantization is not None]
    return max((4.0 * shape.largest * count for shape, count in used), default=0.0)


def _logits(shape: Shape, batch: Batch, settings: Settings, device: Device, *, gradients: bool = True) -> float:
    """Bytes of logits and of what is computed from them."""
    vocab = shape.vocab
    if batch.head != "tiles":
        if not gradients:
            return batch.logits * vocab * (2.0 if settings.bf16 else 4.0) + 16.0 * _PIECE
        number = {"loss": (12.0, 14.0), "actions": (16.0, 14.0)}[batch.head][settings.bf16]
        return batch.logits * vocab * number
    tokens, entries = min(batch.logits, _TILE[0]), min(vocab, _TILE[1])
    if device.kind == "cuda":
        return (2.0 if settings.bf16 else 4.0) * tokens * _TILE[1]
    tiles = 8.25 if gradients else 4.0
    return 4.0 * tokens * entries * tiles


# ---- without gradients


def _forward(
    held: Sequence[Held], batch: Batch, settings: Settings, device: Device, base: Memory, whole: float
) -> Memory:
    shape = max((one.shape for one in held), key=lambda shape: shape.vocab * shape.hidden)
    logits = _logits(shape, batch, settings, device, gradients=False) if batch.logits else 0.0
    working = _working(shape, batch.tokens, settings) + _dequantised(held)
    return replace(
        base,
        phase="forward pass",
        activations=working if working > logits else 4.0 * batch.tokens * shape.hidden,
        logits=logits if logits > working else 0.0,
        exchange=whole,
    )


def _sampling(
    held: Sequence[Held], rollout: Rollout, settings: Settings, device: Device, base: Memory, whole: float
) -> Memory:
    shape = next(one.shape for one in held if not one.headless)
    number = 2 if settings.bf16 else 4
    shared = rollout.group > 1
    columns = rollout.rows * (rollout.answer + (rollout.prompt / rollout.group if shared else rollout.prompt))
    cache = number * shape.cache * columns * (1 + 1 / shape.layers)
    if device.kind == "cpu" and shape.family in FAMILIES_DECODED:
        cache += number * shape.linear
    # The probabilities of a row, their sums and what they are made from.
    logits = 12.0 * rollout.rows * shape.vocab
    working = _working(shape, min(_PREFILL[device.kind], rollout.rows * rollout.prompt), settings) + _dequantised(held)
    return replace(base, phase="sampling", cache=cache, logits=logits, activations=working, exchange=whole)


# ---- time


def _flops(held: Sequence[Held], work: Work, settings: Settings, rows: int | None) -> float | None:
    """Multiplications and additions of the whole section: two for each weight that a token meets, three times that for
    a forward and backward pass, and one forward pass more where activations are computed again."""
    if rows is None:
        return None
    tokens = float(rows * work.row_tokens)
    total = 0.0
    for one in held:
        scored = work.train.scored if work.train is not None else None
        share = 1.0 if scored is None or work.train is None else scored / work.train.length
        head = 0.0 if one.headless else share * one.shape.embedding
        length = work.train.length if work.train is not None else work.row_tokens
        attention = one.shape.layers * one.shape.heads * one.shape.head_dim * length
        each = 2.0 * (one.shape.active + head) + 2.0 * attention
        passes = float(work.looks)
        if one.model.trained:
            backward = 2.0 if one.adapter is None else 1.0  # weights below an adapter have no gradients
            passes += work.passes * (1.0 + backward + settings.checkpointing)
            passes += work.looks if work.rollout is not None and not one.headless else 0.0
        total += tokens * each * passes
    return total
