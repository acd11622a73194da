"""A small training of two models under every engine: the same numbers as one process, on the requested engine.

The file is also the program that the processes run: `accelerate launch --config_file ... -m tests.test_engines OUT`; a
second folder is that of an earlier run, whose state it goes on from as well.
"""

import json
import math
import sys
from pathlib import Path

import pytest

from tests.launching import grouped

STEPS, ROWS, MICRO = 4, 8, 2
CLIP = 0.5  # below the first gradient norms, so that clipping has an effect
LRS = (0.05, 0.02)  # of the policy and of the critic
ENGINES = {
    "cpu2": ("ddp", None, "DistributedDataParallel"),
    "cpu2_zero2": ("deepspeed", 2, "DeepSpeedEngine"),
    "cpu2_zero3": ("deepspeed", 3, "DeepSpeedEngine"),
    "cpu2_fsdp2": ("fsdp2", None, "FSDPPair"),
}


def program(out: Path, other: Path | None) -> None:
    """Trains twice (with and without clipping), saves in the middle, resumes into fresh objects, writes what it saw."""
    from training import engines

    engine = engines.start()
    import torch
    from torch import nn
    from torch.distributed.tensor import DTensor
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

    from training.config import OptimizerConfig
    from training.engines import files

    def small() -> LlamaConfig:
        return LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=48,
            tie_word_embeddings=True,
        )  # fmt: skip

    class Pair(nn.Module):
        """A policy and a critic, as in PPO."""

        def __init__(self) -> None:
            super().__init__()
            self.policy = LlamaForCausalLM(small())
            self.critic = LlamaModel(small())
            self.head = nn.Linear(32, 1)

        def forward(self, ids, mask):
            logits = self.policy(input_ids=ids, attention_mask=mask).logits
            return logits, self.head(self.critic(input_ids=ids, attention_mask=mask).last_hidden_state).squeeze(-1)

    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(4, 12, (STEPS, ROWS), generator=generator)
    tokens = torch.randint(3, 48, (STEPS, ROWS, 12), generator=generator)

    def make(clip: float, seed: int):
        train = OptimizerConfig(learning_rate=0.01, per_device_train_batch_size=MICRO, max_grad_norm=clip)
        engine.set_up(train, width=16)
        if engine.request.zero_stage == 3:  # parameters as small as these would be left whole
            config = engine._accelerator.state.deepspeed_plugin.deepspeed_config
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        torch.manual_seed(seed)
        model = Pair()
        groups = [
            {"params": list(model.policy.parameters()), "lr": LRS[0]},
            {"params": [*model.critic.parameters(), *model.head.parameters()], "lr": LRS[1]},
        ]
        return engine.prepare(model, torch.optim.AdamW(groups, eps=0.01))

    def take(model, optimizer, step: int, clip: float, broken: bool = False) -> dict:
        mine = list(engine.share(ROWS))
        count = int((lengths[step] - 1).sum())
        for group, peak in zip(optimizer.param_groups, LRS):
            group["lr"] = peak * (1 - step / STEPS)
        loss_sum = 0.0
        batches = [mine[i : i + MICRO] for i in range(0, len(mine), MICRO)]
        for number, rows in enumerate(batches):
            ids = tokens[step, rows]
            mask = (torch.arange(12) < lengths[step, rows, None]).long()
            logits, values = model(ids, mask)
            kept = mask[:, 1:].bool()
            nll = nn.functional.cross_entropy(logits[:, :-1][kept], ids[:, 1:][kept], reduction="sum")
            error = (values[:, 1:][kept] - (ids[:, 1:][kept] % 3).float()).square().sum()
            loss = (nll + 0.5 * error) / count
            if broken and engine.data_rank == engine.data_world - 1:
                loss = loss + torch.inf  # its gradient would be finite
            engine.backward(model, loss, last=number == len(batches) - 1)
            loss_sum += loss.item()
        norm = engine.step(model, optimizer, clip)
        return {"loss": sum(engine.of_all(loss_sum)), "norm": norm, "rows": engine.of_all(mine)}

    def generate(model) -> list:
        """Greedy; the row of rank r takes 3 + 4 r steps, so that no forward pass may wait for another process."""
        answers = {}
        with engine.whole(model) as plain:
            for row in engine.share(2):
                ids = tokens[0, row : row + 1, :4]
                for _ in range(3 + 4 * row):
                    logits = plain.policy(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
                    ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
                answers[row] = {"ids": ids[0].tolist(), "logit": logits.abs().mean().item()}
        merged = {k: v for part in engine.of_all(answers) for k, v in part.items()}
        return [merged[0], merged[1]]

    def save_on_a_full_disk(model, optimizer) -> int | None:
        """The error's number. No process keeps waiting for the one that cannot write."""
        full = out / "full"
        if engine.is_main:
            full.mkdir()
            for part in (files.MODEL, files.OPTIMIZER):
                (full / part).symlink_to("/dev/full")
        try:
            files.save_state(engine, model, optimizer, full)
        except OSError as error:
            return error.errno
        return None

    def whole_weights(model) -> dict:
        return {entry.name: entry.whole().detach().float().clone() for entry in engine.weights(model)}

    def read_frozen(state: Path) -> dict:
        """A model that is only read: cut up outside of `whole`, whole inside, mixed with the policy, saved, loaded."""
        torch.manual_seed(3)
        plain = LlamaForCausalLM(small())
        ids = tokens[0, :2, :4]
        with torch.no_grad():
            expected = plain(input_ids=ids).logits
        frozen = engine.freeze(LlamaForCausalLM(small()))
        kept = sum(p._local_tensor.numel() if isinstance(p, DTensor) else p.ds_tensor.numel() if "ds_shape" in vars(p)
                   else p.numel() for p in frozen.parameters())  # fmt: skip
        torch.manual_seed(3)
        other = LlamaForCausalLM(small())
        values = dict(other.named_parameters())
        engine.load_weights(frozen, values, lambda name: values[name].detach())
        with engine.whole(frozen) as whole:
            logits = [whole(input_ids=ids).logits for _ in range(1 + engine.data_rank)][-1]  # nobody waits
            shapes = {name: tuple(p.shape) for name, p in whole.named_parameters()}
        engine.mix(frozen, model, "policy", 0.25)
        files.write_tensors(engine, state / "frozen.safetensors", engine.weights(frozen))
        engine.barrier()  # the main process writes
        files.load_frozen(engine, frozen, state / "frozen.safetensors")
        mixed = whole_weights(frozen)
        policy = {k.removeprefix("policy."): v for k, v in whole_weights(model).items() if k.startswith("policy.")}
        wanted = {name: values[name].detach().lerp(policy[name], 0.25) for name in values}
        return {
            "kept": kept / sum(p.numel() for p in plain.parameters()),
            "same": torch.allclose(logits, expected, atol=1e-6),
            "shapes": all(shapes[name] == tuple(p.shape) for name, p in plain.named_parameters()),
            "mixed": all(torch.allclose(mixed[name], wanted[name], atol=1e-6) for name in wanted),
            "training": frozen.training or any(p.requires_grad for p in frozen.parameters()),
        }

    seen: dict = {"engine": vars(engine.request), "record": engine.record().model_dump()}
    model, optimizer = make(CLIP, seed=0)
    seen["class"], seen["processes"] = type(model).__name__, engine._accelerator.num_processes
    if engine.request.zero_stage == 3:
        assert model.optimizer.persistent_parameters == []
    seen["generated"] = [generate(model)]  # before any forward pass of the whole
    state = out / "state"
    seen["clipped"] = []
    for step in range(STEPS):
        seen["clipped"].append(take(model, optimizer, step, CLIP))
        if step == 1:
            seen["generated"].append(generate(model))
            if engine.is_main:
                state.mkdir(parents=True)
            engine.barrier()
            files.save_state(engine, model, optimizer, state)
            seen["refused"] = engine.of_all(save_on_a_full_disk(model, optimizer))
    seen["frozen"] = engine.of_all(read_frozen(state))
    final = whole_weights(model)
    if engine.is_main:
        torch.save(final, out / "final.pt")

    model, optimizer = make(CLIP, seed=1)
    files.load_state(engine, model, optimizer, state)
    seen["broken"] = take(model, optimizer, 2, CLIP, broken=True)  # which changes nothing
    seen["resumed"] = [take(model, optimizer, step, CLIP) for step in range(2, STEPS)]
    again = whole_weights(model)
    seen["resumed equal"] = all(torch.equal(final[key], again[key]) for key in final)

    if other is not None:
        files.load_state(engine, model, optimizer, other / "state")  # over moments that are there
        seen["borrowed"] = [take(model, optimizer, step, CLIP) for step in range(2, STEPS)]

    model, optimizer = make(0.0, seed=0)
    seen["free"] = [take(model, optimizer, step, 0.0) for step in range(2)]
    if engine.is_main:
        (out / "seen.json").write_text(json.dumps(seen))
    engine.shutdown()


def launch(config: str, out: Path, root: Path, *other: Path) -> dict:
    out.mkdir(parents=True)
    done = grouped(root, config, "tests.test_engines", out, *other)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads((out / "seen.json").read_text())


@pytest.fixture(scope="module")
def alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("alone") / "run"
    return launch("cpu", out, root), out


@pytest.mark.slow
def test_one_process_is_the_reference_for_all_engines(alone: tuple[dict, Path]) -> None:
    seen, _ = alone
    assert seen["record"].pop("threads") >= 1
    assert seen["record"] == {"name": "single", "zero_stage": None, "processes": 1, "device": "cpu"}
    assert seen["resumed equal"] and seen["resumed"] == seen["clipped"][2:]
    assert not math.isfinite(seen["broken"]["norm"])
    assert seen["clipped"][0]["norm"] > CLIP
    # Clipping must change the results after the first step; otherwise the tests below would not test it.
    assert abs(seen["clipped"][1]["loss"] - seen["free"][1]["loss"]) > 1e-3
    assert seen["generated"][0] != seen["generated"][1]


@pytest.mark.slow
@pytest.mark.parametrize("config", ENGINES)
def test_engine_trains_as_one_process_does(config: str, alone: tuple[dict, Path], root: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    one, out_one = alone
    seen = launch(config, tmp_path / "run", root, out_one)
    name, stage, cls = ENGINES[config]
    assert seen["record"].pop("threads") >= 1
    assert seen["record"] == {"name": name, "zero_stage": stage, "processes": 2, "device": "cpu"}
    assert (seen["class"], seen["processes"]) == (cls, 2)
    for part in ("clipped", "free"):
        for mine, theirs in zip(one[part], seen[part], strict=True):
            assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-5)
            assert theirs["norm"] == pytest.approx(mine["norm"], rel=1e-5)
            first, second = theirs["rows"]
            assert not set(first) & set(second) and sorted(first + second) == sorted(mine["rows"][0])
    for before_or_after in (0, 1):
        for mine, theirs in zip(one["generated"][before_or_after], seen["generated"][before_or_after], strict=True):
            assert theirs["ids"] == mine["ids"]
            assert theirs["logit"] == pytest.approx(mine["logit"], rel=1e-4)
    for found in seen["frozen"]:
        splits = config in ("cpu2_zero3", "cpu2_fsdp2")
        assert found["kept"] < 0.55 if splits else found["kept"] == 1.0
        assert found["same"] and found["shapes"] and found["mixed"] and not found["training"]
    assert seen["resumed"] == seen["clipped"][2:] and seen["resumed equal"]
    assert not math.isfinite(seen["broken"]["norm"])
    for mine, theirs in zip(one["clipped"][2:], seen["borrowed"], strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-5)
        assert theirs["norm"] == pytest.approx(mine["norm"], rel=1e-5)
    for part in ("model.safetensors", "optimizer.safetensors"):
        mine, theirs = (load_file(folder / "state" / part) for folder in (out_one, tmp_path / "run"))
        assert theirs.keys() == mine.keys() and len(mine) > 40
        for key, value in mine.items():
            torch.testing.assert_close(theirs[key], value, rtol=1e-4, atol=1e-5)
    final, reference = (torch.load(folder / "final.pt", weights_only=True) for folder in (tmp_path / "run", out_one))
    assert final.keys() == reference.keys()
    for key, value in final.items():
        assert value.dtype == torch.float32 and value.numel() > 0
        torch.testing.assert_close(value, reference[key], rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    program(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
