"""The command that starts vLLM in place of this server. No torch here."""

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from typing import Literal, NoReturn

from baton.serve.settings import Limits
from handoff.errors import UserError
from handoff.files import read_json
from handoff.gate import ADAPTER_CONFIG
from handoff.parent import Parent

Choice = Literal["auto", "inprocess", "vllm"]


def chosen(engine: Choice, gpus: int) -> Literal["inprocess", "vllm"]:
    """`auto`: vLLM where there are a GPU and vLLM, else the engine of this process.

    Raises:
        UserError: vLLM is wanted and not installed.
    """
    there = importlib.util.find_spec("vllm") is not None or shutil.which("vllm") is not None
    if engine == "vllm" and not there:
        raise UserError(
            "--engine vllm: vLLM is not installed here; `pip install vllm` on a machine with a GPU (docs/vllm.md), or "
            "use --engine inprocess"
        )
    return "vllm" if engine == "vllm" or (engine == "auto" and gpus > 0 and there) else "inprocess"


@dataclass(frozen=True)
class Command:
    """A command, and what it needs in its environment."""

    arguments: list[str]
    environment: dict[str, str]

    def run(self) -> NoReturn:
        """Becomes that command."""
        sys.stdout.flush()
        os.execvpe(self.arguments[0], self.arguments, {**os.environ, **self.environment})


def command(parent: Parent, host: str, port: int, key: str | None, limits: Limits) -> Command:
    """`vllm serve` for this model.

    vLLM reads the stop ids and the chat template from the published directory, as every program does. The key is in its
    environment, since everyone on the machine can read a command line.

    Raises:
        UserError: vLLM cannot serve this model so.
    """
    if port == 0:
        raise UserError("--port 0: vLLM takes no free port by itself; name one")
    arguments = [
        *(shutil.which("vllm") or "vllm", "serve"),
        str(parent.weights_dir),
        *("--host", host, "--port", str(port)),
        *("--tokenizer", str(parent.model_dir)),
        *("--dtype", _precision(parent)),
        *("--max-num-seqs", str(limits.batch_size)),
        *("--generation-config", str(parent.model_dir)),
        *("--seed", "0"),
        "--disable-uvicorn-access-log",
    ]
    template = parent.model_dir / "chat_template.jinja"
    if template.is_file():
        arguments += ["--chat-template", str(template)]
    if parent.adapter_dir is None:
        arguments += ["--served-model-name", parent.name]
    else:
        if parent.quantization is not None:
            raise UserError(f"{parent.path}: it is an adapter over quantised weights; use --engine inprocess")
        size = read_json(parent.adapter_dir / ADAPTER_CONFIG)["r"]
        arguments += ["--enable-lora", "--max-lora-rank", str(_allowed(size))]
        arguments += ["--lora-modules", f"{parent.name}={parent.adapter_dir}"]
        arguments += ["--served-model-name", f"{parent.name}-base"]
    return Command(arguments, {} if key is None else {"VLLM_API_KEY": key})


def _precision(parent: Parent) -> str:
    """That of the weights. By itself, vLLM would compute with float32 weights in float16."""
    config = read_json(parent.weights_dir / "config.json")
    return str(config.get("dtype") or config.get("torch_dtype") or "auto")


def _allowed(size: int) -> int:
    """vLLM takes only these sizes of adapters."""
    return next((known for known in (8, 16, 32, 64, 128, 256, 320, 512) if known >= size), size)
