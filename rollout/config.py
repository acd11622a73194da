"""The part of a recipe that says how vLLM answers prompts. No torch here."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_REQUESTS = ("base_url", "timeout", "sync_timeout", "start_timeout", "retries", "retry_wait", "concurrency")
_SERVER_ONLY = (*_REQUESTS, "transfer", "weights_dir", "transfer_port")
_COLOCATE_ONLY = ("gpu_memory_utilization", "tensor_parallel_size", "max_model_len")


class VLLMConfig(BaseModel):
    """Sampling by vLLM instead of by the policy's own forward pass (docs/vllm.md)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    mode: Literal["server", "colocate"] = "server"
    """`server`: a vLLM server of your own that answers over HTTP. `colocate`: vLLM inside every training process, on
    the same GPU."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision that vLLM computes in. Weights are sent in it, and a server that serves in another is refused."""

    base_url: str = Field(default="http://127.0.0.1:8000", pattern=r"^https?://[^/]+$")
    """Address of the server: scheme, host and port."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds that one answer may take."""
    sync_timeout: float = Field(default=600.0, gt=0)
    """Seconds that the server may take over new weights."""
    start_timeout: float = Field(default=300.0, ge=0)
    """Seconds to wait for a server that is still starting, or starting again after it died."""
    retries: int = Field(default=3, ge=0)
    """How often an answer, or a transfer of weights, is tried again after the first failure."""
    retry_wait: float = Field(default=1.0, gt=0)
    """Seconds before the first new try; each further wait is twice as long."""
    concurrency: int = Field(default=256, ge=1)
    """Requests under way at once."""
    transfer: Literal["disk", "nccl"] = "disk"
    """How weights reach the server. `disk`: a safetensors file in a folder that both see. `nccl`: from GPU to GPU,
    where vLLM can be imported in the training processes, too."""
    weights_dir: str | None = None
    """Folder for `disk`; by default the system's for temporary files. One in memory (/dev/shm) is fastest; a server on
    another machine needs one that both machines see under the same path."""
    transfer_port: int = Field(default=0, ge=0, le=65535)
    """Port of the main training process where the server's workers meet it for `nccl`; 0: any free one."""

    gpu_memory_utilization: float = Field(default=0.3, gt=0, le=1)
    """Share of the GPU's memory that a colocated vLLM takes for weights and its cache; training needs the rest."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Training processes that share one colocated vLLM; it must divide their number."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Tokens of prompt and answer together in a colocated vLLM; by default what the model allows."""

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
