"""The vLLM engine against a real vLLM, if one is installed.

    BATON_VLLM=/path/to/bin/vllm pytest tests/test_rollout_vllm_real.py

vLLM needs a separate environment (docs/vllm.md); a build for CPUs suffices. Without the variable these tests are
skipped, and the engine is tested only against the fake server of tests/fake_vllm.py.
"""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from rollout.batch import pad_batch
from rollout.engine import generate
from rollout.logprobs import completion_logprobs
from rollout.mismatch import check_mismatch, mismatch_metrics
from rollout.sampling import SamplingSpec
from rollout.vllm import VLLMEngine
from tests.fake_vllm import CPU, KEYS, PROMPTS, SPEC, config, free_port, save_tiny, trained

VLLM = os.environ.get("BATON_VLLM")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(VLLM is None, reason="BATON_VLLM names no vllm command")]
ON_GPU = torch.cuda.is_available()
DTYPE = "bfloat16" if ON_GPU else "float32"
LIMIT = 0.05 if ON_GPU else 1e-4  # nats a token, on average


class RealServer:
    """`vllm serve` in a process group of its own."""

    def __init__(self, model_dir: Path, log: Path) -> None:
        self.model_dir, self.log, self.port = model_dir, log, free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [str(VLLM), "serve", str(self.model_dir), "--port", str(self.port), "--host", "127.0.0.1"]
        command += ["--dtype", DTYPE, "--logprobs-mode", "processed_logprobs", "--max-model-len", "256"]
        command += ["--skip-tokenizer-init", "--enforce-eager"]
        environment = (
            {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ | {"VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1"}
        )
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model_dir, tmp_path_factory):
    real = RealServer(model_dir, tmp_path_factory.mktemp("log") / "vllm.log")
    real.start()
    yield real
    real.kill()


@pytest.fixture(scope="module")
def engine(server, model_dir):
    keys = {"start_timeout": 300.0, "timeout": 120.0, "sync_timeout": 120.0}
    made = VLLMEngine(config(server, dtype=DTYPE, **keys), model_dir, CPU, is_main=True)
    yield made
    made.close()


def metrics_of(model, completions, temperature):
    batch = pad_batch(PROMPTS, [c.ids for c in completions], 0, CPU)
    with torch.no_grad():
        logp, _ = completion_logprobs(model, batch, temperature)
    engine_logp = pad_sequence([torch.tensor(c.logprobs) for c in completions], batch_first=True)
    return mismatch_metrics(engine_logp, logp, batch.completion_mask)


@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_its_log_probabilities_are_those_of_the_weights_that_were_sent(engine, model_dir, noise):
    model = trained(model_dir, noise)
    engine.update_weights(model.named_parameters(), 0)
    completions = engine.generate(PROMPTS, SPEC, KEYS, seed=1)
    check_mismatch(metrics_of(model, completions, SPEC.temperature), LIMIT)
    assert {c.end for c in completions} <= {"stop", "length"}
    other = trained(model_dir, 0.3)
    assert metrics_of(other, completions, SPEC.temperature)["sampling/sampling_logp_difference/mean"] > 10 * LIMIT


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.7}, {"top_k": 20, "top_p": 0.7}])
def test_its_log_probabilities_are_those_of_the_truncated_distribution(engine, model_dir, cut):
    model = trained(model_dir)
    engine.update_weights(model.named_parameters(), 1)
    spec = SamplingSpec(1, (2,), 0, temperature=1.5, **cut)
    for prompt, completion in zip(PROMPTS, engine.generate(PROMPTS, spec, KEYS, seed=1), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1] / 1.5
        p = torch.softmax(logits, -1)
        if "top_k" in cut:
            p = torch.where(p >= p.topk(cut["top_k"]).values[-1], p, 0.0)
            p = p / p.sum()
        if "top_p" in cut:
            ordered = p.sort(descending=True)
            kept = ordered.indices[ordered.values.cumsum(-1) - ordered.values < cut["top_p"]]
            p = torch.zeros_like(p).scatter(0, kept, p[kept])
            p = p / p.sum()
        assert completion.logprobs[0] == pytest.approx(float(p[completion.ids[0]].log()), abs=20 * LIMIT)


def test_stop_tokens_end_answers_and_belong_to_them(engine, model_dir):
    model = trained(model_dir)
    engine.update_weights(model.named_parameters(), 1)
    spec = SamplingSpec(40, tuple(range(3, 20)), 0)
    completions = engine.generate(PROMPTS, spec, KEYS, seed=1)
    assert all(c.end == "stop" and 3 <= c.ids[-1] < 20 for c in completions)
    assert all(not 3 <= token < 20 for c in completions for token in c.ids[:-1])
    # The model's own end token is not a stop id of this spec, so sampling continues after it.
    everything = engine.generate(PROMPTS * 8, SamplingSpec(60, (63,), 0, 2.0), [(i,) for i in range(48)], seed=3)
    assert any(2 in c.ids[:-1] for c in everything)


def test_greedy_tokens_are_those_of_the_engine_of_this_process(engine, model_dir):
    model = trained(model_dir)
    engine.update_weights(model.named_parameters(), 2)
    spec = SamplingSpec(12, (2,), 0, temperature=0.0)
    theirs = engine.generate(PROMPTS, spec, KEYS, seed=1)
    if not ON_GPU:
        assert [c.ids for c in theirs] == [c.ids for c in generate(model, PROMPTS, spec, KEYS, seed=1)]
    check_mismatch(metrics_of(model, theirs, 1.0), LIMIT)


def test_a_rerun_repeats_and_another_seed_does_not(engine, model_dir):
    engine.update_weights(trained(model_dir).named_parameters(), 3)
    first = [c.ids for c in engine.generate(PROMPTS, SPEC, KEYS, seed=1)]
    assert [c.ids for c in engine.generate(PROMPTS, SPEC, KEYS, seed=1)] == first
    assert [c.ids for c in engine.generate(PROMPTS, SPEC, KEYS, seed=2)] != first


def test_a_server_killed_during_answers_is_restarted_without_loss(engine, server, model_dir, caplog):
    model = trained(model_dir)
    engine.update_weights(model.named_parameters(), 4)
    prompts, spec = PROMPTS * 32, SamplingSpec(200, (2,), 0)
    keys = [("row", i) for i in range(len(prompts))]
    undisturbed = [c.ids for c in engine.generate(prompts, spec, keys, seed=1)]

    def again() -> None:
        time.sleep(0.5)
        server.kill()
        server.start()

    killer = threading.Thread(target=again)
    killer.start()
    answers = engine.generate(prompts, spec, keys, seed=1)
    killer.join()
    assert "was restarted: sending its weights again" in caplog.text
    # The batches differ, so a few rows may differ in a last bit and in all later tokens.
    same = sum(a.ids == b for a, b in zip(answers, undisturbed, strict=True))
    assert same > 0.9 * len(prompts)
    batch = pad_batch(prompts, [c.ids for c in answers], 0, CPU)
    with torch.no_grad():
        logp, _ = completion_logprobs(model, batch, 1.0)
    engine_logp = pad_sequence([torch.tensor(c.logprobs) for c in answers], batch_first=True)
    check_mismatch(mismatch_metrics(engine_logp, logp, batch.completion_mask), LIMIT)
