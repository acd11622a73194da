"""The recipe's `vllm` section: how vLLM generates rollouts. No torch here."""

from typing import ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_REQUESTS = ("base_url", "timeout", "sync_timeout", "start_timeout", "retries", "retry_wait", "concurrency")
_SERVER_ONLY = (*_REQUESTS, "transfer", "weights_dir", "transfer_port")
_COLOCATE_ONLY = ("gpu_memory_utilization", "tensor_parallel_size", "max_model_len")


class VLLMConfig(BaseModel):
    """Sampling by vLLM instead of by the policy's own forward pass (docs/vllm.md)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    without_effect: ClassVar[frozenset[str]] = frozenset(
        {*_REQUESTS, "transfer", "weights_dir", "transfer_port", "gpu_memory_utilization", "tensor_parallel_size"}
    )
    """The keys on which the answers do not depend: where the server is, and how weights and requests reach it."""

    mode: Literal["server", "colocate"] = "server"
    """`server`: a vLLM server that you run, reached over HTTP. `colocate`: vLLM inside every training process, on the
    same GPU."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of vLLM's computation. Weights are sent in it, and a server with another precision is refused."""

    base_url: str = Field(default="http://127.0.0.1:8000", pattern=r"^https?://[^/]+$")
    """Address of the server: scheme, host and port."""
    timeout: float = Field(default=600.0, gt=0)
    """Time limit for one answer, in seconds."""
    sync_timeout: float = Field(default=600.0, gt=0)
    """Time limit for loading new weights, in seconds."""
    start_timeout: float = Field(default=300.0, ge=0)
    """Seconds to wait for a server that is still starting, or starting again after it died."""
    retries: int = Field(default=3, ge=0)
    """Number of retries of an answer or a transfer of weights after the first failure."""
    retry_wait: float = Field(default=1.0, gt=0)
    """Seconds before the first retry; each further wait is twice as long."""
    concurrency: int = Field(default=256, ge=1)
    """Number of concurrent requests."""
    transfer: Literal["disk", "nccl"] = "disk"
    """How weights reach the server. `disk`: a safetensors file in a folder that both can read. `nccl`: from GPU to GPU;
    the training processes must be able to import vLLM too."""
    weights_dir: str | None = None
    """Folder for `disk`; by default the system's temporary folder. A folder in memory (/dev/shm) is fastest. A server
    on another machine needs a shared folder with the same path on both machines."""
    transfer_port: int = Field(default=0, ge=0, le=65535)
    """Port of the main training process to which the server's workers connect for `nccl`; 0: any free port."""

    gpu_memory_utilization: float = Field(default=0.3, gt=0, le=1)
    """Share of the GPU's memory for the weights and cache of a colocated vLLM; training needs the rest."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Number of training processes that share one colocated vLLM; it must divide their total number."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Maximum tokens of prompt and answer together in a colocated vLLM; by default the model's maximum."""

    @model_validator(mode="after")
    def _read(self) -> Self:
        for key in _COLOCATE_ONLY if self.mode == "server" else _SERVER_ONLY:
            if key in self.model_fields_set:
                raise ValueError(f"`{key}` is not read in mode {self.mode}")
        if self.transfer == "disk" and "transfer_port" in self.model_fields_set:
            raise ValueError("`transfer_port` is not read unless transfer is nccl")
        if self.transfer == "nccl" and "weights_dir" in self.model_fields_set:
            raise ValueError("`weights_dir` is not read unless transfer is disk")
        return self
