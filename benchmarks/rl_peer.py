"""The peer's side of the reinforcement-learning benchmarks: TRL's own trainer, which pauses between two updates.

    PYTHON rl_peer.py ppo|grpo|sft SETTINGS      (started by benchmarks/turns.py, not by hand; SETTINGS is JSON)

It runs in the peer's environment, so of our modules it imports only turns.py, which is in the same folder.

Settings: policy, reward (model folders), prompts (JSON lines), output (a folder), rows, micro_batch, response, epochs,
generations, and `arguments`: further keyword arguments of TRL's configuration. With `adapter`, keyword arguments of
peft's LoraConfig, an adapter is trained. Everything else is TRL's default.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from transformers.models.llama import modeling_llama  # noqa: F401  before memory is counted
from turns import Turns


class Stepped(TrainerCallback):
    """Waits at the end of each update."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

        self._logged: dict[str, Any] = {}

    def on_log(self, *_: Any, **kwargs: Any) -> None:
        self._logged = kwargs["logs"]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._turns.done(self._logged)


def ppo(settings: dict[str, Any]) -> None:
    """TRL 1.12's PPOTrainer. It has its own loop, and reads only some of the Trainer's arguments."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    turns = Turns()
    tokenizer = AutoTokenizer.from_pretrained(settings["policy"])
    rows = [
        {"input_ids": tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)}
        for prompt in _prompts(settings)
    ]
    policy, reference = (AutoModelForCausalLM.from_pretrained(settings["policy"]) for _ in range(2))
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(settings["reward"], num_labels=1) for _ in range(2)
    )
    arguments = PPOConfig(
        response_length=settings["response"],
        num_ppo_epochs=settings["epochs"],
        total_episodes=10**6,
        num_sample_generations=0,
        stop_token="eos",
        temperature=1.0,
        **_common(settings),
    )
    trainer = PPOTrainer(
        arguments, tokenizer, policy, reference, reward, Dataset.from_list(rows), value, callbacks=[Stepped(turns)]
    )
    trainer.train()


def grpo(settings: dict[str, Any]) -> None:
    """TRL 1.16's GRPOTrainer, with a reward that costs nothing."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    turns = Turns()
    tokenizer = AutoTokenizer.from_pretrained(settings["policy"])
    policy = AutoModelForCausalLM.from_pretrained(settings["policy"])

    def score(completions: list[Any], **_: Any) -> list[float | None]:
        firsts = [c[0]["content"].partition(" ")[0].removeprefix("w") for c in completions]
        return [int(first or 0) / policy.config.vocab_size for first in firsts]

    arguments = GRPOConfig(
        max_completion_length=settings["response"],
        num_generations=settings["generations"],
        num_iterations=settings["epochs"],
        max_steps=10**6,
        **_common(settings),
    )
    rows = [{"prompt": prompt} for prompt in _prompts(settings)]
    trainer = GRPOTrainer(
        policy,
        score,
        arguments,
        Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Stepped(turns)],
        peft_config=_adapter(settings),
    )
    trainer.train()


def sft(settings: dict[str, Any]) -> None:
    """TRL 1.16's SFTTrainer, on rows with `prompt` and `completion`; the loss counts completions."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    turns = Turns()
    tokenizer = AutoTokenizer.from_pretrained(settings["policy"])
    policy = AutoModelForCausalLM.from_pretrained(settings["policy"])
    lines = Path(settings["prompts"]).read_text(encoding="utf-8").splitlines()
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in map(json.loads, lines)
    ]
    trainer = SFTTrainer(
        policy,
        SFTConfig(max_steps=10**6, **_common(settings)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Stepped(turns)],
        peft_config=_adapter(settings),
    )
    trainer.train()


def _adapter(settings: dict[str, Any]) -> Any:
    if "adapter" not in settings:
        return None
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **settings["adapter"])


def _common(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": settings["output"],
        "per_device_train_batch_size": settings["micro_batch"],
        "gradient_accumulation_steps": settings["rows"] // settings["micro_batch"],
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        **settings["arguments"],
    }


def _prompts(settings: dict[str, Any]) -> list[list[dict[str, str]]]:
    lines = Path(settings["prompts"]).read_text(encoding="utf-8").splitlines()
    return [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in lines]


if __name__ == "__main__":
    torch.manual_seed(0)
    {"ppo": ppo, "grpo": grpo, "sft": sft}[sys.argv[1]](json.loads(sys.argv[2]))
