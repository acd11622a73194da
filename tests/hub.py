"""Folders that stand for models and data sets of the hub: tiny models with random weights, and rows of our own in the
format of each public data set. Where the working directory has a folder with such a name, `datasets` and Baton take it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from tests.test_chat_templates import NAMES, TEMPLATES, tokenizer
from tests.test_families import FAMILIES, GEMMA, publish

ROWS = 600
_SEEING = "Gemma 3, with pictures"
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_VISION |= {"image_size": 32, "patch_size": 8}


def _asked(n: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Sort the words: pear{n}, apple"}]


def _chat(n: int) -> dict[str, Any]:
    return {
        "messages": [*_asked(n), {"role": "assistant", "content": f"apple, pear{n}"}],
        "source": "here",
        "id": str(n),
    }


def _pair(n: int) -> dict[str, Any]:
    good, bad = ([*_asked(n), {"role": "assistant", "content": text}] for text in ("apple, pear", "pear"))
    scores = {"score_chosen": 8.0, "score_rejected": 4.5}
    return {
        "prompt": _asked(n)[0]["content"],
        "prompt_id": str(n),
        "chosen": good,
        "rejected": bad,
        "messages": good,
        **scores,
    }


def _preference(n: int) -> dict[str, Any]:
    made = _pair(n)
    return {"id": str(n), "source": "here", "chosen": made["chosen"], "rejected": made["rejected"]}


def _sum(n: int) -> dict[str, Any]:
    return {
        "question": f"Ann has {n} pears and buys 2. How many has she?",
        "answer": f"{n} + 2 = {n + 2}\n#### {n + 2}",
    }


def _verifiable(n: int) -> dict[str, Any]:
    """Every second row is a sum, every other one has a constraint on the answer's form."""
    row = {
        "messages": _asked(n),
        "dataset": "gsm8k",
        "constraint_type": None,
        "constraint": None,
        "ground_truth": str(n),
    }
    if n % 2:
        keys = dict.fromkeys(("N", "quantifier", "forbidden_words", "keyword_list", "word", "letter"))
        row |= {"dataset": "ifeval", "constraint_type": "All Lowercase", "constraint": "No capitals."}
        row["ground_truth"] = json.dumps({"func_name": "validate_lowercase", **keys})
    return row


# {data set: (its subset, {split: a row})}
DATA: dict[str, tuple[str, dict[str, Callable[[int], dict[str, Any]]]]] = {
    "openai/gsm8k": ("main", {"train": _sum, "test": _sum}),
    "HuggingFaceTB/smoltalk": ("all", {"train": _chat, "test": _chat}),
    "HuggingFaceH4/ultrachat_200k": ("default", {"train_sft": _chat, "test_sft": _chat}),
    "HuggingFaceH4/ultrafeedback_binarized": ("default", {"train_prefs": _pair, "test_prefs": _pair}),
    "allenai/tulu-3-sft-mixture": ("default", {"train": _chat}),
    "allenai/tulu-3-sft-olmo-2-mixture-0225": ("default", {"train": _chat}),
    "allenai/olmo-2-1124-7b-preference-mix": ("default", {"train": _preference}),
    "allenai/RLVR-GSM-MATH-IF-Mixed-Constraints": ("default", {"train": _verifiable}),
}
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
# {model: (family of tests/test_families.py, the published sizes)}
MODELS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "Qwen/Qwen3-0.6B-Base": ("Qwen3", (1024, 3072, 28, 16, 8, 151936), {"head_dim": 128, "tie_word_embeddings": True}),
    "Qwen/Qwen3-8B-Base": ("Qwen3", (4096, 12288, 36, 32, 8, 151936), {"head_dim": 128}),
    "HuggingFaceTB/SmolLM3-3B": ("SmolLM3", (2048, 11008, 36, 16, 4, 128256), {"tie_word_embeddings": True}),
    "meta-llama/Llama-3.1-8B-Instruct": ("Llama 3", (4096, 14336, 32, 32, 8, 128256), {}),
    "mistralai/Mistral-7B-Instruct-v0.3": ("Mistral", (4096, 14336, 32, 32, 8, 32768), {}),
    "google/gemma-3-4b-it": (_SEEING, (2560, 10240, 34, 8, 4, 262208), {"head_dim": 256, "tie_word_embeddings": True}),
    "allenai/OLMo-2-1124-7B-SFT": ("OLMo 2", (4096, 11008, 32, 32, 32, 100352), {}),
}


def write_data(folder: Path) -> None:
    """Every data set, as a folder with the name that it has on the hub."""
    for name, (subset, splits) in DATA.items():
        place = folder / name
        place.mkdir(parents=True)
        files = [{"split": split, "path": f"{split}.jsonl"} for split in splits]
        head = yaml.safe_dump({"configs": [{"config_name": subset, "data_files": files}]})
        (place / "README.md").write_text(f"---\n{head}---\n")
        for number, (split, row) in enumerate(splits.items()):
            rows = (row(number * 1000 + n) for n in range(ROWS))
            (place / f"{split}.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in rows))


def write_model(folder: Path, name: str) -> None:
    """A tiny model of the family of `name`, as a folder with that name."""
    family = MODELS[name][0]
    if family != _SEEING:
        publish(folder / name, family)
        return
    made = tokenizer()
    made.chat_template = TEMPLATES["gemma3"]
    made.save_pretrained(folder / name)
    ids = {f"{role}_id": made.convert_tokens_to_ids(text) for role, text in NAMES.items()}
    text = GEMMA | {"vocab_size": len(made) + 8, **ids}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=_VISION, mm_tokens_per_image=4, **ids)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name)


def write_sizes(folder: Path, name: str) -> None:
    """The config.json of the published model, as far as `baton plan` reads it."""
    family, sizes, more = MODELS[name]
    kind = "gemma3_text" if family == _SEEING else FAMILIES[family][0]
    keys = {"model_type": kind, "tie_word_embeddings": False, **dict(zip(_SIZES, sizes, strict=True)), **more}
    (folder / name).mkdir(parents=True)
    (folder / name / "config.json").write_text(json.dumps(keys))
