"""Reads and checks a launch file before anything is started. accelerate itself answers a mistake in one with a
traceback, and ignores a key that it does not know inside `deepspeed_config` or `fsdp_config`. No torch here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from training.engines.launch import REHEARSAL, LaunchError, Request
from training.recipe_text import Document, KeyPath, did_you_mean, read_document

RUN_BY_BATON = ("NO", "MULTI_GPU", "DEEPSPEED", "FSDP")
"""The values of `distributed_type` that Baton runs."""
WHOLE_NUMBERS = frozenset({"num_processes", "machine_rank", "num_machines", "main_process_port"})
TEXTS = frozenset({"distributed_type", "gpu_ids", "main_process_ip", "rdzv_backend", "mixed_precision"})
MAPPINGS = frozenset(
    {"deepspeed_config", "fsdp_config", "dynamo_config", "fp8_config", "parallelism_config", "megatron_lm_config",
     "mpirun_config"}
)  # fmt: skip
OTHERS = frozenset(
    {"compute_environment", "use_cpu", "debug", "same_network", "main_training_function", "enable_cpu_affinity",
     "downcast_bf16", "tpu_name", "tpu_zone", "tpu_use_cluster", "tpu_use_sudo", "command_file", "commands", "tpu_vm",
     "tpu_env"}
)  # fmt: skip
OLD = frozenset({"fp16", "dynamo_backend"})
"""Keys of earlier versions of accelerate, which it still reads."""
DEEPSPEED = frozenset(
    {"deepspeed_config_file", "zero_stage", "offload_optimizer_device", "offload_param_device",
     "offload_optimizer_nvme_path", "offload_param_nvme_path", "gradient_accumulation_steps", "gradient_clipping",
     "zero3_init_flag", "zero3_save_16bit_model", "deepspeed_hostfile", "deepspeed_exclusion_filter",
     "deepspeed_inclusion_filter", "deepspeed_multinode_launcher", "deepspeed_moe_layer_cls_names"}
)  # fmt: skip
FSDP = frozenset(
    {"fsdp_version", "fsdp_offload_params", "fsdp_min_num_params", "fsdp_sharding_strategy",
     "fsdp_reshard_after_forward", "fsdp_auto_wrap_policy", "fsdp_transformer_layer_cls_to_wrap",
     "fsdp_backward_prefetch", "fsdp_state_dict_type", "fsdp_forward_prefetch", "fsdp_use_orig_params",
     "fsdp_cpu_ram_efficient_loading", "fsdp_sync_module_states", "fsdp_activation_checkpointing",
     "fsdp_activation_checkpointing_offload"}
)  # fmt: skip


@dataclass(frozen=True)
class LaunchFile:
    """What a launch file says."""

    path: Path
    request: Request
    """The engine that it asks for."""
    machines: int
    machine_rank: int
    """Number of the machine on which the file is used, from 0. The main process runs on machine 0."""
    address: str
    """Where the processes meet: an address or a name of machine 0."""
    port: int
    """The port there; 0: a free one is chosen."""

    @property
    def processes_here(self) -> int:
        """How many processes run on one machine."""
        return max(1, self.request.processes // self.machines)


def read_launch_file(path: Path) -> LaunchFile:
    """Reads a launch file, with accelerate's defaults for what it leaves out.

    Raises LaunchError as `check_launch_file`.
    """
    keys = check_launch_file(path)
    return LaunchFile(
        path=path,
        request=_request(path, keys),
        machines=max(1, keys.get("num_machines", 1)),
        machine_rank=keys.get("machine_rank", 0),
        address=keys.get("main_process_ip", "127.0.0.1"),
        port=keys.get("main_process_port", 29500),
    )


def _request(path: Path, keys: dict[str, Any]) -> Request:
    kind, processes = keys["distributed_type"], keys.get("num_processes", 1)
    device: Literal["cpu", "cuda"] = "cpu" if keys.get("use_cpu") or keys.get("gpu_ids") == REHEARSAL else "cuda"
    if kind == "DEEPSPEED":
        stage = (keys.get("deepspeed_config") or {}).get("zero_stage", 2)
        if stage not in (1, 2, 3):
            raise LaunchError(f"{path}: zero_stage: {stage}; Baton uses 1, 2 or 3")
        return Request("deepspeed", stage, processes, device)
    if kind == "FSDP":
        return Request("fsdp2", None, processes, device)
    return Request("ddp" if processes > 1 else "single", None, processes, device)


def check_launch_file(path: Path) -> dict[str, Any]:
    """The keys of a launch file. Raises LaunchError with every mistake found, each with its line and key."""
    if not path.is_file():
        raise LaunchError(f"--launch {path}: no such file; the repository's own are in recipes/launch/")
    document = read_document(path)
    if not document.problems:
        if isinstance(document.value, dict):
            _check(document, document.value)
        else:
            document.complain((), "is empty" if document.value is None else "must hold keys: distributed_type, ...")
    if document.problems:
        found = "\n".join(str(problem) for problem in sorted(set(document.problems)))
        raise LaunchError(f"{found}\nrecipes/launch/ has launch files that work")
    keys: dict[str, Any] = document.value
    return keys


def _check(document: Document, keys: dict[str, Any]) -> None:
    known = WHOLE_NUMBERS | TEXTS | MAPPINGS | OTHERS | OLD
    for name, value in keys.items():
        if name not in known:
            document.complain((name,), f"accelerate has no such key{did_you_mean(name, known)}")
        elif name in WHOLE_NUMBERS and type(value) is not int:
            document.complain((name,), f"expected a whole number, not {value!r}")
        elif name in TEXTS and not isinstance(value, str):
            document.complain((name,), f"expected text, not {value!r}; put it in quotes")
        elif name in MAPPINGS and not isinstance(value, dict | None):
            document.complain((name,), f"expected keys and values, not {value!r}")
    for name, inner in (("deepspeed_config", DEEPSPEED), ("fsdp_config", FSDP)):
        value = keys.get(name)
        for key in value if isinstance(value, dict) else ():
            # In fsdp_config, `version` means fsdp_version.
            if key not in inner and f"fsdp_{key}" not in inner:
                document.complain((name, key), f"accelerate has no such key{did_you_mean(key, inner)}")
    _check_kind(document, keys)


def _check_kind(document: Document, keys: dict[str, Any]) -> None:
    def say(key: str, message: str) -> None:
        path: KeyPath = (key,) if key in keys else ()
        document.complain(path, message, key)

    kind = keys.get("distributed_type")
    if kind not in RUN_BY_BATON:
        what = "missing" if kind is None else f"Baton does not run {kind}"
        hint = did_you_mean(str(kind), RUN_BY_BATON) or f"; there are {', '.join(RUN_BY_BATON)}"
        say("distributed_type", what + hint)
    if keys.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        say("compute_environment", "Baton runs on LOCAL_MACHINE")
    if keys.get("rdzv_backend", "static") != "static":
        say("rdzv_backend", "accelerate reads this key from its command line alone: remove it here")
    processes = keys.get("num_processes", 1 if kind == "NO" else None)
    if processes is None:
        say("num_processes", "missing: how many processes are started, over all machines")
    elif type(processes) is int and processes < 1:
        say("num_processes", f"{processes} processes cannot be started")
    machines, port = keys.get("num_machines", 1), keys.get("main_process_port", 0)
    if type(machines) is int and machines > 1:
        if type(processes) is int and processes % machines:
            say("num_processes", f"{processes} processes cannot be shared evenly by {machines} machines")
        if keys.get("machine_rank", 0) not in range(machines):
            say("machine_rank", f"{machines} machines have the numbers 0 to {machines - 1}")
    if type(port) is int and port not in range(2**16):
        say("main_process_port", f"{port} is no port; ports go up to {2**16 - 1}")
    gpus = keys.get("gpu_ids", "all")
    alone = isinstance(gpus, str) and gpus != "all" and "," not in gpus
    if kind == "MULTI_GPU" and alone and keys.get("num_machines", 1) in (0, 1):
        say("gpu_ids", f"MULTI_GPU needs two GPUs or more on one machine, and this names {gpus!r} alone")
