"""The gate (handoff/gate.py, handoff/settings.py): malformed directories are refused, and nothing else is read."""

import ast
import builtins
import inspect
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import transformers
from transformers import GenerationConfig, PretrainedConfig

import training.parent_weights
from handoff.contract import check_foreign
from handoff.encoding import read_tokenizer
from handoff.errors import HandoffError, UserError
from handoff.files import hash_tree
from handoff.gate import LIMITS, TOKENIZER_FILES, loaded_files
from handoff.manifest import EngineRecord, Manifest, sealed
from handoff.parent import Parent, open_parent
from handoff.settings import OWN_NAMES
from handoff.verify import verify_run
from handoff.weights import INDEX_NAME
from tests.handoff_models import inputs, write, write_model
from tests.hostile_models import Mutation, mutations, write_good
from tests.test_upstream import SOURCES
from training import engines
from training.config import ModelArguments
from training.model import Model, load_encoder
from training.model_files import generation_config

ENGINE = engines.current()
SECONDS = 120  # for one directory; only a hang takes so long
_opened: list[str] | None = None


def _record(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event in ("open", "socket.connect", "subprocess.Popen", "os.system"):
        _opened.append(str(arguments[0]))


sys.addaudithook(_record)


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The paths that are opened inside, those of weights (which are opened outside Python) included."""
    global _opened

    def asked(*_: object) -> str:
        raise AssertionError("standard input was read")

    def opened(path: Any, *arguments: Any, **keys: Any) -> Any:
        assert _opened is not None
        _opened.append(str(path))
        return safetensors.safe_open(path, *arguments, **keys)

    def alarm(*_: object) -> None:
        raise AssertionError("it hangs")

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.setattr(training.parent_weights, "safe_open", opened)
    monkeypatch.setattr(transformers.modeling_utils, "safe_open", opened)
    previous = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(SECONDS)
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def load(folder: Path) -> dict[str, torch.Tensor]:
    """What a stage does with a parent before it trains."""
    parent = open_parent(str(folder), folder.parent / "run", {"causal_lm"})
    encoder = load_encoder(parent)
    model = Model.load(ENGINE, parent, "policy", encoder, ModelArguments(), bf16=False)
    generation_config(parent.model_dir, encoder)
    return dict(model.module.state_dict())


def stage_of(folder: Path, kind: Any = "causal_lm", **fields: Any) -> Path:
    """Moves the model in `folder` into a stage's directory, with a stage.json that nobody has checked."""
    model = folder.with_name("moved")
    folder.rename(model)
    folder.mkdir()
    model.rename(folder / "model")
    record = fields.pop("tokenizer", None) or read_tokenizer(folder / "model")
    manifest = Manifest(
        **{"name": "sft", "stage": "sft", "kind": kind, "created": "2026-01-01T00:00:00", "inputs": inputs()},
        **{"recipe": {}, "seed": 1, "engine": EngineRecord(name="single"), "tokenizer": record},
        **{"files": {f"model/{name}": digest for name, digest in hash_tree(folder / "model").items()}, **fields},
    )
    write(folder / "stage.json", sealed(manifest))
    return folder


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_good(tmp_path / "good")


# ---- malformed directories


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "several files"])
def test_a_malformed_directory_is_refused_by_name_or_loads_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    good, folder, outside = tmp_path / "good", tmp_path / "copy", tmp_path / "outside"
    write_good(good, sharded)
    write_good(outside)
    shutil.copytree(good, outside, dirs_exist_ok=True)
    before = hash_tree(outside)
    expected = load(good)
    kinds = list(mutations(good))
    if sharded:  # the other files are the same as in the first case
        kinds = [kind for kind in kinds if kind[0].startswith("model") or kind[0].startswith("an index")]
    assert len(kinds) > (80 if sharded else 400)
    refused, wrong = 0, []
    for what, mutate in kinds:
        shutil.copytree(good, folder)
        mutate(folder, outside)
        with watched(monkeypatch) as opened:
            try:
                found = load(folder)
            except UserError as error:
                refused += 1
                named = str(folder) in str(error) or "chat template" in str(error)
                printable = str(error).encode("utf-8", "replace").decode() == str(error)
                if not named or not printable or "\n" in str(error) or len(str(error)) > 2000:
                    wrong.append(f"{what}: {error}")
            except BaseException as error:
                wrong.append(f"{what}: {type(error).__name__}: {error}")
            else:
                if found.keys() != expected.keys() or not all(torch.equal(found[k], expected[k]) for k in expected):
                    wrong.append(f"{what}: other weights")
            read = {path for path in opened if str(tmp_path) in path}
        allowed = {str(path) for path in _allowed(folder)}
        wrong += [f"{what}: {path} was opened" for path in read - allowed]
        shutil.rmtree(folder)
    assert wrong == [], "\n".join(wrong[:20])
    assert hash_tree(outside) == before
    assert refused > 0.7 * len(kinds)


def _allowed(folder: Path) -> set[Path]:
    """The files of a directory that may be opened; to `kept`, links inside the directory lead."""
    names = {*LIMITS, "kept", *(path.name for path in folder.glob("*.safetensors"))}
    return {folder / name for name in names}


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "transformers_weights", "adapter_model.bin"),
        ("config.json", "_attn_implementation", "org/kernel"),
        ("config.json", "to_dict", 1),
        ("tokenizer_config.json", "fast_tokenizer_files", ["tokenizer.5.0.0.json"]),
        ("special_tokens_map.json", "tokenizer_file", "../outside/tokenizer.json"),
        ("generation_config.json", "eos_token_id", ["<|eos|>"]),
    ],
)
def test_a_stage_json_of_ones_own_skips_no_check(good: Path, file: str, key: str, value: Any) -> None:
    path = good / file
    write(path, {**json.loads(path.read_text()), key: value})
    record = read_tokenizer(good) if key != "eos_token_id" else read_tokenizer(write_good(good.with_name("other")))
    stage_of(good, tokenizer=record)
    with pytest.raises(HandoffError, match=rf"{file}: {key}") as foreign:
        check_foreign(good / "model")
    with pytest.raises(HandoffError, match=re.escape(str(foreign.value))):
        load(good)
    assert [problem.message for problem in verify_run(good.parent)] == [str(foreign.value)]


def test_a_stage_json_that_names_another_kind_or_encoding_is_refused(good: Path) -> None:
    record = read_tokenizer(good)
    stage = stage_of(good, "reward_model")
    with pytest.raises(HandoffError, match=r"stage\.json says reward_model, config\.json causal_lm"):
        open_parent(str(stage), stage.parent, {"reward_model"})
    shutil.move(stage / "model", stage.with_name("again"))
    again = stage_of(stage.with_name("again"), tokenizer=record.model_copy(update={"pad_id": 9}))
    with pytest.raises(HandoffError, match=r"another encoding than the files: .*'pad_id': 9"):
        open_parent(str(again), stage.parent, {"causal_lm"})


@pytest.mark.parametrize("name", ["../outside", "/outside", "model/../../outside", "", "model/\0"])
def test_a_manifest_names_only_files_of_its_folder(good: Path, name: str) -> None:
    stage = stage_of(good)
    content = json.loads((stage / "stage.json").read_text())
    write(stage / "stage.json", {**content, "files": {**content["files"], name: "0"}})
    with pytest.raises(HandoffError, match="is no file inside the stage's folder"):
        load(stage)


def test_a_fifo_or_a_link_in_a_stage_is_a_change(good: Path) -> None:
    stage = stage_of(good)
    path = stage / "model" / "generation_config.json"
    path.rename(stage.parent / "elsewhere")
    path.symlink_to(stage.parent / "elsewhere")
    with pytest.raises(HandoffError, match=r"generation_config\.json is a link that leaves the folder"):
        load(stage)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(HandoffError, match=r"generation_config\.json is not a regular file"):
        load(stage)
    (stage / "stage.json").unlink()
    os.mkfifo(stage / "stage.json")
    with pytest.raises(HandoffError, match=r"stage\.json is not a regular file"):
        load(stage)


# ---- what is allowed


def test_the_hubs_cache_is_a_folder_of_links_to_blobs(good: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in good.iterdir():
        shutil.copyfile(path, blobs / f"hash-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash-{path.name}")
    assert load(snapshot).keys() == load(good).keys()
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(good / "config.json")
    with pytest.raises(HandoffError, match="link that leaves the folder"):
        load(snapshot)


def test_a_folder_that_is_itself_a_link_is_opened(good: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(good)
    assert load(tmp_path / "link").keys() == load(good).keys()


def test_code_beside_an_architecture_of_transformers_is_passed_over_and_not_published(
    good: Path, tmp_path: Path
) -> None:
    path = good / "config.json"
    write(path, {**json.loads(path.read_text()), "auto_map": {"AutoModelForCausalLM": "modeling_llama.Model"}})
    (good / "modeling_llama.py").write_text("raise SystemExit('it ran')")
    parent = open_parent(str(good), tmp_path / "run", {"causal_lm"})
    model = Model.load(ENGINE, parent, "policy", load_encoder(parent), ModelArguments(), bf16=False)
    (tmp_path / "written").mkdir()
    model.write(tmp_path / "written", model.module)
    assert "auto_map" not in json.loads((tmp_path / "written" / "config.json").read_text())
    write(path, {**json.loads(path.read_text()), "model_type": "of_its_own"})
    with pytest.raises(HandoffError, match=r"config\.json requests remote code .* no model_type 'of_its_own'"):
        check_foreign(good)


def test_the_recipe_chooses_the_attention(good: Path, tmp_path: Path) -> None:
    path = good / "config.json"
    write(path, {**json.loads(path.read_text()), "_attn_implementation": "eager", "attn_implementation": "eager"})
    parent = open_parent(str(good), tmp_path / "run", {"causal_lm"})
    arguments = ModelArguments(attn_implementation="sdpa")
    model = Model.load(ENGINE, parent, "policy", load_encoder(parent), arguments, bf16=False)
    assert model.module.config._attn_implementation == "sdpa"


def test_infinity_is_a_number_of_config_json(tmp_path: Path) -> None:
    write_model(tmp_path)  # as Mamba-2 and its hybrids have it
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("{", '{"time_step_limit": [0.0, Infinity], ', 1))
    assert check_foreign(tmp_path)[0] == "causal_lm"


def test_types_of_numbers_for_a_browser_are_not_transformers(good: Path, tmp_path: Path) -> None:
    """transformers.js has names of its own for them; anywhere else such a name is refused."""
    path = good / "config.json"
    plain, tensors = json.loads(path.read_text()), load(good).keys()
    for dtype in ("q4f16", {"decoder": "q4", "embed_tokens": "fp16"}):
        write(path, {**plain, "transformers.js_config": {"dtype": dtype, "use_external_data_format": True}})
        assert load(good).keys() == tensors
    write(path, {**plain, "transformers.js_config": {"attn_implementation": "org/kernel"}})
    with pytest.raises(HandoffError, match=r"config\.json: transformers\.js_config\.attn_implementation: 'org/kernel'"):
        load(good)
    write(path, {**plain, "text_config": {"dtype": "q4f16"}})
    with pytest.raises(HandoffError, match=r"config\.json: text_config\.dtype: 'q4f16' is no type of numbers"):
        load(good)


def test_one_file_comes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    write_model(tmp_path)
    write(tmp_path / INDEX_NAME, {"weight_map": {"x": "model-00001-of-00001.safetensors"}})
    assert check_foreign(tmp_path)[0] == "causal_lm"
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    (tmp_path / INDEX_NAME).unlink()
    with pytest.raises(HandoffError, match=r"its weights \(weights\.safetensors\) cannot be loaded; rename"):
        check_foreign(tmp_path)


# ---- what is hashed


def test_every_loaded_file_is_part_of_the_fingerprint(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (good / "additional_chat_templates").mkdir()
    (good / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (good / "tokenizer.model").write_bytes(b"x")
    (good / "notes.json").write_text("{}")
    parent = open_parent(str(good), tmp_path / "run", {"causal_lm"})
    assert set(parent.files) == {path.relative_to(good).as_posix() for path in good.rglob("*") if path.is_file()} - {
        "notes.json"
    }
    with watched(monkeypatch) as opened:
        load(good)
        read = {path for path in opened if path.startswith(f"{good}/")}
    assert read <= {str(good / name) for name in parent.files}
    for name in parent.files:
        path = good / name
        content = path.read_bytes()
        path.write_bytes(content + b" " if path.suffix != ".safetensors" else content[:-1] + b"\x07")
        assert open_parent(str(good), tmp_path / "run", {"causal_lm"}).fingerprint != parent.fingerprint, name
        path.write_bytes(content)


def test_every_file_that_a_stage_takes_over_is_known_to_the_gate() -> None:
    assert set(TOKENIZER_FILES) <= set(LIMITS)


# ---- the libraries


def test_the_names_that_a_setting_may_not_have_are_those_of_transformers_classes() -> None:
    settings = {
        *("architectures", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder", "label2id"),
        *("model_type", "name_or_path", "num_labels", "output_attentions", "output_hidden_states", "per_layer_config"),
        *("problem_type", "return_dict", "rope_scaling", "torch_dtype", "transformers_version", "use_return_dict"),
        *("_attn_implementation", "_experts_implementation", "_name_or_path"),
    }
    for kind in (PretrainedConfig, GenerationConfig):
        own = {name for name, _ in inspect.getmembers_static(kind) if name not in dir(object)}
        if kind is PretrainedConfig:
            own |= vars(kind()).keys()
        assert {name for name in own if not OWN_NAMES.fullmatch(name)} <= settings
    assert not any(OWN_NAMES.fullmatch(name) for name in settings)
    assert not any(OWN_NAMES.fullmatch(name) for name in vars(GenerationConfig()))


def test_no_call_that_loads_asks_or_fetches(root: Path) -> None:
    calls = [
        (f"{path.relative_to(root)}:{node.lineno}", ast.unparse(node))
        for package in SOURCES
        for path in sorted((root / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
        and ast.unparse(node.func.value) != "Encoder"
    ]
    assert len(calls) >= 6
    assert [place for place, call in calls if not re.search(r"local_files_only=True|\*\*(LOCAL|keys)", call)] == []


@pytest.mark.parametrize("what", ["FIFOs that nobody reads", "names that are not UTF-8", "pickles beside it"])
def test_files_that_nobody_reads_do_not_count(good: Path, tmp_path: Path, what: str) -> None:
    mutate: dict[str, Mutation] = dict(mutations(good))
    before: Callable[[], Parent] = lambda: open_parent(str(good), tmp_path / "run", {"causal_lm"})  # noqa: E731
    first = before()
    mutate[what](good, tmp_path)
    assert before() == first
    assert set(first.files) == set(loaded_files(good))
