"""The vLLM engine against a fake server: requests, answers, and the weights that they come from."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from rollout.batch import pad_batch
from rollout.config import VLLMConfig
from rollout.engine import generate
from rollout.errors import EngineMissing, TransferFailed, WrongModel
from rollout.logprobs import completion_logprobs
from rollout.sampling import SamplingSpec
from rollout.vllm import VLLMEngine
from rollout.vllm_client import Client
from rollout.vllm_weights import NCCLTransfer, Stored
from tests.fake_vllm import (
    CPU,
    KEYS,
    PROMPTS,
    SPEC,
    FakeVLLM,
    assert_logprobs_of,
    config,
    free_port,
    packed_nccl_broadcast_producer,
    save_tiny,
    trained,
    trainer_init,
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def server(model_dir):
    with FakeVLLM(model_dir, free_port()) as fake:
        yield fake


@pytest.fixture
def engine(server, model_dir, tmp_path):
    made = VLLMEngine(config(server, weights_dir=str(tmp_path)), model_dir, CPU, is_main=True)
    yield made
    made.close()
    assert list(tmp_path.iterdir()) == []


def test_tokens_and_logprobs_are_those_of_the_weights_that_were_sent(engine, server, model_dir):
    model = trained(model_dir)
    engine.update_weights(model.named_parameters(), 0)
    completions = engine.generate(PROMPTS, SPEC, KEYS, seed=1)
    assert_logprobs_of(model, completions, SPEC.temperature)
    assert {c.end for c in completions} == {"stop", "length"}
    for completion in completions:
        assert (completion.ids[-1] in SPEC.stop_ids) == (completion.end == "stop")
        assert len(completion.ids) == SPEC.max_new_tokens or completion.end == "stop"
    assert completions[0].ids != completions[2].ids, "two answers to one prompt have their own seeds"


def test_greedy_tokens_are_those_of_the_engine_of_this_process(engine, model_dir):
    model = trained(model_dir)
    spec = SamplingSpec(8, (2, 17), 0, temperature=0.0)
    engine.update_weights(model.named_parameters(), 0)
    theirs = engine.generate(PROMPTS, spec, KEYS, seed=1)
    ours = generate(model, PROMPTS, spec, KEYS, seed=1)
    assert [c.ids for c in theirs] == [c.ids for c in ours]
    assert [c.end for c in theirs] == [c.end for c in ours]
    assert_logprobs_of(model, theirs, 1.0)


def test_a_rerun_repeats_in_any_order_and_another_seed_does_not(engine, model_dir):
    engine.update_weights(trained(model_dir).named_parameters(), 0)
    first = [c.ids for c in engine.generate(PROMPTS, SPEC, KEYS, seed=1)]
    order = [4, 0, 5, 2, 1, 3]
    again = engine.generate([PROMPTS[i] for i in order], SPEC, [KEYS[i] for i in order], seed=1)
    assert [again[order.index(i)].ids for i in range(len(PROMPTS))] == first
    assert [c.ids for c in engine.generate(PROMPTS, SPEC, KEYS, seed=2)] != first
    assert engine.generate([], SPEC, [], seed=1) == []


def test_a_request_sets_every_sampling_parameter(engine, server, model_dir):
    engine.update_weights(trained(model_dir).named_parameters(), 0)
    engine.generate(PROMPTS[:1], SPEC, KEYS[:1], seed=1)
    (asked,) = server.asked
    assert asked["prompt"] == PROMPTS[0] and asked["max_tokens"] == 8 and asked["n"] == 1
    assert asked["temperature"] == 0.7 and asked["stop_token_ids"] == [2, 17, 30, 31] and asked["ignore_eos"]
    assert (asked["top_p"], asked["top_k"], asked["min_p"]) == (1.0, 0, 0.0)
    assert (asked["repetition_penalty"], asked["presence_penalty"], asked["frequency_penalty"]) == (1.0, 0.0, 0.0)
    assert asked["logprobs"] == 0 and 0 <= asked["seed"] < 2**63
    engine.generate(PROMPTS[:1], SamplingSpec(8, (2,), 0, top_k=5, top_p=0.9), KEYS[:1], seed=1)
    assert (server.asked[1]["top_p"], server.asked[1]["top_k"]) == (0.9, 5)


def test_ids_without_a_token_are_never_sampled_and_have_no_probability(engine, server, model_dir):
    """The tokenizer has 40 ids of the model's 64."""
    model, spec = trained(model_dir), SamplingSpec(8, (2, 17), 0, temperature=1.5, vocab_size=40)
    engine.update_weights(model.named_parameters(), 0)
    prompts = [[5, 9, 11 + i] for i in range(16)]
    keys = [("row", i) for i in range(16)]
    completions = engine.generate(prompts, spec, keys, seed=1)
    assert all(token < 40 for completion in completions for token in completion.ids)
    assert set(server.asked[0]["logit_bias"]) == {str(i) for i in range(40, 64)}
    batch = pad_batch(prompts, [c.ids for c in completions], 0, CPU)
    with torch.no_grad():
        logp, _ = completion_logprobs(model, batch, 1.5, vocab_size=40)
    for i, completion in enumerate(completions):
        assert torch.allclose(torch.tensor(completion.logprobs), logp[i, : len(completion.ids)], atol=1e-5)


def test_new_weights_change_the_answers_and_replace_the_old(engine, server, model_dir, tmp_path):
    before, after = trained(model_dir), trained(model_dir, noise=0.5)
    engine.update_weights(before.named_parameters(), 0)
    old = engine.generate(PROMPTS, SPEC, KEYS, seed=1)
    assert server.cache_filled and server.weight_version.startswith("0@")
    engine.update_weights(after.named_parameters(), 1)
    assert not server.cache_filled and server.weight_version.startswith("1@")
    new = engine.generate(PROMPTS, SPEC, KEYS, seed=1)
    assert [c.ids for c in new] != [c.ids for c in old]
    assert_logprobs_of(after, new, SPEC.temperature)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_leftovers_of_a_killed_run_are_removed_by_the_next(server, model_dir, tmp_path):
    for version in range(2):
        killed = VLLMEngine(config(server, weights_dir=str(tmp_path)), model_dir, CPU, is_main=True)
        killed.update_weights(trained(model_dir).named_parameters(), version)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_weights_are_sent_in_the_precision_that_is_served(model_dir, tmp_path):
    with FakeVLLM(model_dir, free_port(), dtype="torch.bfloat16") as fake:
        engine = VLLMEngine(config(fake, dtype="bfloat16", weights_dir=str(tmp_path)), model_dir, CPU, is_main=True)
        engine.update_weights(trained(model_dir).named_parameters(), 0)
        (file,) = tmp_path.rglob("*.safetensors")
        assert file.stat().st_size < 0.6 * (model_dir / "model.safetensors").stat().st_size
        engine.close()


@pytest.mark.parametrize("twice", [False, True])
def test_tied_embeddings_may_come_once_or_twice(tmp_path, twice):
    model_dir = save_tiny(tmp_path / "tied", tied=True)
    model = trained(model_dir)
    with FakeVLLM(model_dir, free_port()) as fake:
        engine = VLLMEngine(config(fake), model_dir, CPU, is_main=True)
        engine.update_weights(model.state_dict().items() if twice else model.named_parameters(), 0)
        assert_logprobs_of(model, engine.generate(PROMPTS, SPEC, KEYS, seed=1), SPEC.temperature)
        engine.close()


def test_names_and_shapes_other_than_the_stored_ones_are_refused(model_dir, tmp_path):
    named = dict(trained(model_dir).named_parameters())
    stored = Stored.read(model_dir)
    with pytest.raises(WrongModel, match=r"only in training: policy\.lm_head\.weight, policy"):
        stored.select((f"policy.{name}", tensor) for name, tensor in named.items())
    with pytest.raises(WrongModel, match=r"only stored: model\.norm\.weight"):
        stored.select((name, tensor) for name, tensor in named.items() if name != "model.norm.weight")
    with pytest.raises(WrongModel, match=r"lm_head\.weight has shape \[64, 63\] in training but \[64, 64\]"):
        stored.select((name, tensor[:, :-1] if name == "lm_head.weight" else tensor) for name, tensor in named.items())
    # Without tied embeddings, the head must be sent.
    with pytest.raises(WrongModel, match=r"only stored: lm_head\.weight"):
        stored.select((name, tensor) for name, tensor in named.items() if name != "lm_head.weight")
    assert Stored.read(save_tiny(tmp_path / "tied", tied=True)).tied


def test_only_the_main_process_talks_to_the_server(model_dir):
    nobody = config(SimpleNamespace(url=f"http://127.0.0.1:{free_port()}"))
    engine = VLLMEngine(nobody, model_dir, CPU, is_main=False)
    engine.update_weights(trained(model_dir).named_parameters(), 0)
    engine.close()
    assert engine.central
    with pytest.raises(AssertionError):
        engine.generate(PROMPTS, SPEC, KEYS, seed=1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mode": "colocate", "base_url": "http://127.0.0.1:8000"}, "`base_url` is not read in mode colocate"),
        ({"gpu_memory_utilization": 0.5}, "`gpu_memory_utilization` is not read in mode server"),
        ({"transfer_port": 51216}, "`transfer_port` is not read unless transfer is nccl"),
        ({"transfer": "nccl", "weights_dir": "x"}, "`weights_dir` is not read unless transfer is disk"),
        ({"base_url": "127.0.0.1:8000"}, "String should match pattern"),
        ({"retries": "3"}, "valid integer"),
    ],
)
def test_unread_keys_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        VLLMConfig(**keys)


# ---- NCCL, with a store in its place


@pytest.fixture
def nccl(monkeypatch):
    """Fakes vLLM's trainer-side modules; the store blocks where NCCL would."""
    for name in ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    common = ModuleType("vllm.distributed.weight_transfer.nccl_common")
    packed = ModuleType("vllm.distributed.weight_transfer.packed_tensor")
    common.trainer_init, packed.packed_nccl_broadcast_producer = trainer_init, packed_nccl_broadcast_producer
    monkeypatch.setitem(sys.modules, common.__name__, common)
    monkeypatch.setitem(sys.modules, packed.__name__, packed)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return packed


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().bfloat16() for name, tensor in model.named_parameters()}


def test_nccl_sends_what_was_announced_twice_over_one_group(server, model_dir, nccl):
    transfer = NCCLTransfer(Client(server.url), CPU, 0, timeout=20)
    for version, noise in ((0, 0.1), (1, 0.5)):
        model = trained(model_dir, noise)
        transfer.keep(weights_of(model))
        transfer.push(f"{version}@run")
        assert server.weight_version == f"{version}@run"
        state = server.model.state_dict()
        assert all(torch.equal(state[name].bfloat16(), tensor) for name, tensor in weights_of(model).items())
    transfer.close()


def test_nccl_reconnects_after_a_failure(server, model_dir, nccl):
    transfer = NCCLTransfer(Client(server.url), CPU, 0, timeout=20)
    transfer.keep(weights_of(trained(model_dir)))
    transfer.push("0@run")
    server.fault("/update_weights", 1, lambda _: (500, {"error": {"message": "out of memory"}}))
    with pytest.raises(Exception, match="out of memory"):
        transfer.push("1@run")
    assert server.weight_version == "0@run" and not server.updating
    transfer.push("1@run")
    assert server.weight_version == "1@run"
    # A restarted server does not know the group either.
    server.die()
    server.start()
    with pytest.raises(Exception, match="update_weights"):
        transfer.push("1@run")
    transfer.push("1@run")
    assert server.weight_version == "1@run"
    transfer.close()


def test_errors_of_the_sending_side_are_reported(server, model_dir, nccl):
    def breaks(iterator, group, src, post_iter_func):
        for i, (_, tensor) in enumerate(iterator):
            group.store.set(f"0/{i}", tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        raise RuntimeError("NCCL error: unhandled system error")

    nccl.packed_nccl_broadcast_producer = breaks
    transfer = NCCLTransfer(Client(server.url), CPU, 0, timeout=20)
    transfer.keep(weights_of(trained(model_dir)))
    with pytest.raises(TransferFailed, match="unhandled system error"):
        transfer.push("0@run")


def test_nccl_needs_vllm_and_a_gpu(server, model_dir):
    with pytest.raises(EngineMissing, match="No module named 'vllm'"):
        NCCLTransfer(Client(server.url), CPU, 0, timeout=20)
    with pytest.raises(EngineMissing, match="needs a GPU to train on, not cpu"):
        VLLMEngine(config(server, transfer="nccl"), model_dir, CPU, is_main=True)
    server.served["backend"] = None
    with pytest.raises(WrongModel, match="no weight-transfer engine for NCCL"):
        VLLMEngine(config(server, transfer="nccl"), model_dir, CPU, is_main=True)


# ---- colocated, with a stand-in for the module


class FakeLLM:
    """The used part of vllm.LLM, with the fake server's model."""

    made: "FakeLLM"

    def __init__(self, model: str, **keys) -> None:
        if keys["gpu_memory_utilization"] < 0.05:
            raise ValueError("No available memory for the cache blocks.")
        self.keys, self.fake, self.resets = keys, FakeVLLM(Path(model), 0), 0
        self.fake.model = self.fake.original
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=keys["max_model_len"] or 128))
        FakeLLM.made = self

    def collective_rpc(self, method: str, kwargs: dict) -> list[None]:
        assert method == "reload_weights"
        self.fake.load(dict(kwargs["weights_iterator"]))
        return [None]

    def reset_prefix_cache(self) -> bool:
        self.resets += 1
        return True

    def generate(self, prompts: list[dict], params: list[dict], use_tqdm: bool) -> list[SimpleNamespace]:
        out = []
        for prompt, keys in zip(prompts, params, strict=True):
            ids, logprobs, reason = self.fake.sample({"prompt": prompt["prompt_token_ids"], **keys})
            entries = [{i: SimpleNamespace(logprob=value)} for i, value in zip(ids, logprobs, strict=True)]
            answer = SimpleNamespace(token_ids=ids, logprobs=entries, finish_reason=reason)
            out.append(SimpleNamespace(outputs=[answer]))
        return out


@pytest.fixture
def vllm_here(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, dict
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")


def test_colocated_answers_come_from_the_given_weights(model_dir, vllm_here):
    engine = VLLMEngine(VLLMConfig(mode="colocate", dtype="float32", max_model_len=64), model_dir, CPU, is_main=False)
    assert not engine.central
    keys = FakeLLM.made.keys
    assert keys["dtype"] == "float32" and keys["logprobs_mode"] == "processed_logprobs"
    assert keys["gpu_memory_utilization"] == 0.3 and keys["distributed_executor_backend"] == "uni"
    for version, noise in ((0, 0.1), (1, 0.5)):
        model = trained(model_dir, noise)
        engine.update_weights(model.named_parameters(), version)
        assert_logprobs_of(model, engine.generate(PROMPTS, SPEC, KEYS, seed=1), SPEC.temperature)
    assert FakeLLM.made.resets == 2
    with pytest.raises(WrongModel, match="vLLM takes 64 tokens at most"):
        engine.generate([[5] * 60], SPEC, KEYS[:1], seed=1)
    engine.close()


def test_colocated_vllm_that_is_missing_or_does_not_start(model_dir, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(EngineMissing, match=r"mode colocate needs vLLM .*No module named 'vllm'"):
        VLLMEngine(VLLMConfig(mode="colocate"), model_dir, CPU, is_main=True)


def test_colocated_vllm_without_memory_says_which_key(model_dir, vllm_here):
    with pytest.raises(EngineMissing, match=r"No available memory .*gpu_memory_utilization 0\.01"):
        VLLMEngine(VLLMConfig(mode="colocate", gpu_memory_utilization=0.01), model_dir, CPU, is_main=True)
    with pytest.raises(EngineMissing, match="tensor_parallel_size 2 does not divide the 1 processes"):
        VLLMEngine(VLLMConfig(mode="colocate", tensor_parallel_size=2), model_dir, CPU, is_main=True)


def test_a_checkpoint_without_weights_is_refused(model_dir, tmp_path):
    shutil.copy(model_dir / "config.json", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 64
    with pytest.raises(ValueError, match="has no weights"):
        Stored.read(tmp_path)
