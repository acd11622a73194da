"""The vLLM engine with a failing server: each failure is a named error, or costs only time."""

import threading

import pytest

from rollout.errors import (
    ConnectionBroken,
    LogprobsMissing,
    RolloutError,
    ServerFailed,
    ServerRefused,
    ServerTimeout,
    ServerUnreachable,
    StaleWeights,
    TransferFailed,
    WrongAnswer,
    WrongModel,
)
from rollout.vllm import VLLMEngine
from tests.fake_vllm import (
    CPU,
    KEYS,
    PROMPTS,
    SPEC,
    FakeVLLM,
    assert_logprobs_of,
    config,
    error,
    free_port,
    save_tiny,
    trained,
)

OVERLOADED = (500, {"error": {"message": "EngineCore encountered an issue."}})


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(model_dir):
    return trained(model_dir)


@pytest.fixture
def server(model_dir):
    with FakeVLLM(model_dir, free_port()) as fake:
        yield fake


def make(server, model, model_dir, **keys) -> VLLMEngine:
    engine = VLLMEngine(config(server, **keys), model_dir, CPU, is_main=True)
    engine.update_weights(model.named_parameters(), 0)
    return engine


@pytest.fixture
def engine(server, model, model_dir):
    made = make(server, model, model_dir, retries=2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(model_dir, model):
    """The answers of a server that never fails."""
    with FakeVLLM(model_dir, free_port()) as fake:
        engine = make(fake, model, model_dir)
        answers = engine.generate(PROMPTS, SPEC, KEYS, seed=1)
        engine.close()
    return [(c.ids, c.end) for c in answers]


def answers(engine) -> list[tuple[list[int], str]]:
    return [(c.ids, c.end) for c in engine.generate(PROMPTS, SPEC, KEYS, seed=1)]


# ---- starting


def test_no_server_at_the_address_says_how_to_start_one(model_dir):
    port = free_port()
    nobody = FakeVLLM(model_dir, port)
    with pytest.raises(
        ServerUnreachable, match=f"vllm serve {model_dir} --port {port} --dtype float32 --logprobs-mode"
    ):
        VLLMEngine(config(nobody, start_timeout=0.05), model_dir, CPU, is_main=True)


def test_the_engine_waits_for_a_starting_server(model_dir, model):
    late = FakeVLLM(model_dir, free_port())
    late.fault("/health", 2, lambda _: (503, b""))
    threading.Timer(0.2, late.start).start()
    engine = make(late, model, model_dir)
    engine.close()
    late.die()
    assert not late.faults["/health"]


@pytest.mark.parametrize(
    ("served", "message"),
    [
        ({"dtype": "torch.bfloat16"}, "computes in bfloat16, but vllm.dtype is float32"),
        ({"logprobs_mode": "raw_logprobs"}, "returns raw_logprobs, not those of the tempered distribution"),
    ],
)
def test_a_server_with_unsuitable_settings_is_refused(model_dir, served, message):
    with FakeVLLM(model_dir, free_port(), **served) as fake, pytest.raises(WrongModel, match=message):
        VLLMEngine(config(fake), model_dir, CPU, is_main=True)


@pytest.mark.parametrize(("size", "word"), [(63, "fewer"), (65, "more")])
def test_a_server_of_a_model_with_another_vocabulary_is_refused(model_dir, tmp_path, size, word):
    other = save_tiny(tmp_path / "other", vocab_size=size)
    with (
        FakeVLLM(other, free_port()) as fake,
        pytest.raises(WrongModel, match=f"has 64 tokens, but the served .* {word}"),
    ):
        VLLMEngine(config(fake), model_dir, CPU, is_main=True)


@pytest.mark.parametrize("path", ["/server_info", "/weight_info"])
def test_a_server_without_the_development_endpoints_is_refused(server, model_dir, path):
    server.fault(path, 1, lambda _: (404, {"detail": "Not Found"}))
    with pytest.raises(WrongModel, match=r"status 404.*vLLM 0\.28 or later .*VLLM_SERVER_DEV_MODE=1 vllm serve"):
        VLLMEngine(config(server), model_dir, CPU, is_main=True)


def test_a_prompt_too_long_for_the_server_is_refused_before_sending(engine, server):
    server.asked.clear()
    with pytest.raises(WrongModel, match="takes 256 tokens at most; a prompt of 250 and an answer of up to 8"):
        engine.generate([[5] * 250], SPEC, KEYS[:1], seed=1)
    assert server.asked == []


# ---- answers that do not come


def test_a_transient_failure_costs_one_retry(engine, server, undisturbed):
    server.fault("/v1/completions", 3, lambda _: OVERLOADED)
    assert answers(engine) == undisturbed
    assert len(server.asked) == len(PROMPTS) + 3, "only the rows that failed are asked for again"


def test_a_persistent_failure_is_raised_after_the_retries(engine, server):
    server.fault("/v1/completions", 99, lambda _: OVERLOADED)
    with pytest.raises(ServerFailed, match=r"6 of 6 answers did not come after 3 tries.*EngineCore encountered"):
        answers(engine)
    assert len(server.asked) == 3 * len(PROMPTS)


def test_a_refusal_is_raised_at_once(engine, server):
    server.fault("/v1/completions", 99, lambda _: error(400, "max_tokens=8 cannot be greater than max_model_len"))
    with pytest.raises(ServerRefused, match=r"status 400: max_tokens=8 cannot be greater"):
        answers(engine)
    assert len(server.asked) <= len(PROMPTS)


def test_a_slow_answer_times_out(server, model, model_dir, undisturbed):
    engine = make(server, model, model_dir, timeout=1.0, retries=1)
    release = threading.Event()

    def hangs(body):
        release.wait(10)
        return OVERLOADED

    server.fault("/v1/completions", 1, hangs)
    assert answers(engine) == undisturbed
    server.fault("/v1/completions", 2, hangs)
    with pytest.raises(ServerTimeout, match=r"1 of 1 answers did not come after 2 tries.*no answer within 1 s"):
        engine.generate(PROMPTS[:1], SPEC, KEYS[:1], seed=1)
    release.set()
    engine.close()


def test_a_malformed_response_is_an_error(engine, server):
    for reply in ((200, b"<html>"), (200, {"choices": [{"text": "hello"}]}), (200, ["no object"])):
        server.fault("/v1/completions", 3, lambda _, reply=reply: reply)
        with pytest.raises(ServerFailed, match=r"is not JSON|not a completion of vLLM"):
            engine.generate(PROMPTS[:1], SPEC, KEYS[:1], seed=1)


# ---- a server that dies


def test_a_server_that_dies_at_a_request_and_comes_back_without_weights(engine, server, undisturbed, caplog):
    def dies(body):
        server.restart_after(0.3)

    assert server.weight_version != "default"
    server.fault("/v1/completions", 1, dies)
    assert answers(engine) == undisturbed
    assert server.weight_version.startswith("0@")
    assert "was restarted: sending its weights again" in caplog.text
    assert "answers are requested again" in caplog.text


def test_rows_answered_before_the_death_are_kept_and_those_after_it_are_not(server, model, model_dir, undisturbed):
    """One request at a time, so that their order is known: two succeed, the third kills the server."""
    engine = make(server, model, model_dir, concurrency=1)
    count = 0

    def counted(body, answer):
        nonlocal count
        count += 1
        return answer

    server.alter = counted

    def dies(body):
        server.restart_after(0.2)

    plain = server.complete
    server.asked.clear()
    server.fault("/v1/completions", 2, plain)
    server.fault("/v1/completions", 1, dies)
    assert answers(engine) == undisturbed
    assert count == len(PROMPTS), "no row was answered twice"
    assert [row["prompt"] for row in server.asked] == [*PROMPTS[:3], *PROMPTS[2:]]
    engine.close()


def test_a_restarted_server_gets_its_weights_before_it_answers(engine, server, model, undisturbed):
    assert answers(engine) == undisturbed
    server.die()
    server.start()
    completions = engine.generate(PROMPTS, SPEC, KEYS, seed=1)
    assert [(c.ids, c.end) for c in completions] == undisturbed
    assert_logprobs_of(model, completions, SPEC.temperature)


def test_answers_of_a_server_that_lost_its_weights_unnoticed_do_not_count(server, model, model_dir, undisturbed):
    """The server restarts between two requests, so that no connection breaks; only the tag after the round shows it."""
    engine = make(server, model, model_dir, concurrency=1)

    def anew(body, answer):
        if len(server.asked) == 3:
            server.model, server.weight_version = server.original, "default"
        return answer

    server.asked.clear()
    server.alter = anew
    assert answers(engine) == undisturbed
    assert len(server.asked) == 2 * len(PROMPTS)
    engine.close()


def test_a_dead_server_is_reported(server, model, model_dir):
    engine = make(server, model, model_dir, start_timeout=0.2)
    server.fault("/v1/completions", 1, lambda body: server.die())
    with pytest.raises(ServerUnreachable, match=r"no vLLM server answered within 0\.2 s .*Start one with"):
        answers(engine)
    engine.close()


def test_a_repeatedly_breaking_connection_is_reported(engine, server):
    server.fault("/v1/completions", 99, lambda body: None)
    with pytest.raises(ConnectionBroken, match="6 of 6 answers did not come after 3 tries"):
        answers(engine)


def test_weights_of_another_run_are_an_error(engine, server):
    server.weight_version = "7@other"
    with pytest.raises(StaleWeights, match=r"has the weights '7@other' instead of '0@.*another run also sends weights"):
        answers(engine)
    server.weight_version = engine._server._tag

    def other_run(body, answer):
        server.weight_version = "8@other"
        return answer

    server.alter = other_run
    with pytest.raises(StaleWeights, match="8@other"):
        answers(engine)


# ---- answers that are not what was asked for


def change(**changes):
    def alter(body, answer):
        answer["choices"][0].update(changes)
        return answer

    return alter


@pytest.mark.parametrize(
    ("alter", "kind", "message"),
    [
        (lambda b, a: {"choices": a["choices"] * 2}, WrongAnswer, "sent 2 answers to a request for one"),
        (lambda b, a: {"choices": []}, WrongAnswer, "sent 0 answers"),
        (change(logprobs=None), LogprobsMissing, "sent no log-probabilities"),
        (change(prompt_token_ids=[1, 5]), WrongAnswer, "another prompt than it was sent"),
        (change(token_ids=[5, 6]), WrongAnswer, "log-probabilities are not those of the answer's 2 tokens"),
        (
            change(token_ids=[-3], logprobs={"tokens": ["token_id:-3"], "token_logprobs": [-1.0]}),
            WrongAnswer,
            "has the id -3, but the vocabulary has 64",
        ),
        (
            change(token_ids=[64], logprobs={"tokens": ["token_id:64"], "token_logprobs": [-1.0]}),
            WrongAnswer,
            "has the id 64, but the vocabulary has 64",
        ),
        (
            change(
                token_ids=[5, 17, 6],
                logprobs={"tokens": ["token_id:5", "token_id:17", "token_id:6"], "token_logprobs": [-1.0] * 3},
            ),
            WrongAnswer,
            "of 3 tokens goes on after the stop token in place 1",
        ),
        (
            change(token_ids=[2], finish_reason="stop", logprobs={"tokens": ["token_id:2"], "token_logprobs": [0.5]}),
            WrongAnswer,
            r"log-probability 0\.5; none is above 0",
        ),
        (change(finish_reason="abort"), ServerFailed, r"aborted the answer \(finish_reason abort\)"),
        (
            change(token_ids=[5], logprobs={"tokens": ["token_id:5"], "token_logprobs": [-1.0]}),
            WrongAnswer,
            "without a stop token has 1 tokens instead of 8",
        ),
        (
            change(token_ids=[5], finish_reason="stop", logprobs={"tokens": ["token_id:5"], "token_logprobs": [-1.0]}),
            WrongAnswer,
            "stops without a stop token",
        ),
        (
            change(token_ids=[2], logprobs={"tokens": ["token_id:2"], "token_logprobs": [None]}),
            LogprobsMissing,
            "1 tokens came with 0 log-probabilities",
        ),
        (
            change(token_ids=[2], logprobs={"tokens": ["token_id:2"], "token_logprobs": [float("nan")]}),
            LogprobsMissing,
            "1 tokens came with 0 log-probabilities",
        ),
        (
            change(token_ids=[2], logprobs={"tokens": ["token_id:2"], "token_logprobs": [-9999.0]}),
            LogprobsMissing,
            "1 tokens came with 0 log-probabilities",
        ),
        (
            change(token_ids=[2], logprobs={"tokens": ["token_id:2"], "token_logprobs": []}),
            LogprobsMissing,
            "1 tokens came with 0 log-probabilities",
        ),
    ],
)
def test_an_answer_that_does_not_match_the_request_is_an_error(engine, server, alter, kind, message):
    server.alter = alter
    with pytest.raises(kind, match=message):
        answers(engine)


# ---- weights that do not arrive


def test_a_transfer_that_fails_once_is_repeated(engine, server, model, undisturbed):
    server.fault("/collective_rpc", 1, lambda _: OVERLOADED)
    engine.update_weights(model.named_parameters(), 1)
    assert server.weight_version.startswith("1@")
    assert answers(engine) == undisturbed


def test_a_failing_transfer_is_raised_and_stale_weights_never_generate(engine, server, model):
    server.fault("/collective_rpc", 99, lambda _: OVERLOADED)
    with pytest.raises(
        TransferFailed, match=r"did not reach the server .*EngineCore.*check that it serves .*vllm\.weights_dir"
    ):
        engine.update_weights(model.named_parameters(), 1)
    with pytest.raises(AssertionError, match="update_weights has to succeed"):
        answers(engine)


def test_a_folder_that_the_server_cannot_read_is_reported(engine, server, model, monkeypatch):
    monkeypatch.setattr("tests.fake_vllm.load_file", lambda file: {})
    server.fault("/collective_rpc", 3, lambda _: error(500, "Repo id must be in the form 'repo_name'"))
    with pytest.raises(TransferFailed, match=r"Repo id must be .*can read the folder vllm\.weights_dir"):
        engine.update_weights(model.named_parameters(), 1)


def test_a_server_that_forgets_its_weights_tag_is_reported(engine, server, model):
    server.fault("/update_weight_version", 3, lambda _: (200, {"success": True}))
    with pytest.raises(TransferFailed, match=r"after the transfer, its tag for the weights is '0@.* instead of '1@"):
        engine.update_weights(model.named_parameters(), 1)


def test_a_cache_that_cannot_be_emptied_is_reported(engine, server, model):
    server.fault("/reset_prefix_cache", 3, lambda _: (200, {"success": False}))
    with pytest.raises(TransferFailed, match="could not empty its prefix cache"):
        engine.update_weights(model.named_parameters(), 1)


def test_a_full_or_missing_folder_is_reported(server, model, model_dir, tmp_path, monkeypatch):
    with pytest.raises(TransferFailed, match=r"vllm\.weights_dir: .*nowhere/.*: No such file or directory"):
        make(server, model, model_dir, weights_dir=str(tmp_path / "nowhere"))

    def full(*args, **keys):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rollout.vllm_weights.save_file", full)
    with pytest.raises(TransferFailed, match=r"No space left.*the weights take .* GB.*vllm\.weights_dir"):
        make(server, model, model_dir, weights_dir=str(tmp_path))


def test_every_error_is_one_that_a_user_can_read():
    assert issubclass(RolloutError, ValueError)
    assert all(issubclass(kind, RolloutError) for kind in (ConnectionBroken, StaleWeights, TransferFailed, WrongModel))
