"""Imported by the server process that stages are forked from: everything heavy that a stage may import.

Nothing here may start a thread or touch a GPU: neither survives a fork.
"""

import os

# torch asks the driver how many GPUs there are through its own library then, which would make CUDA unusable in a fork;
# with this it asks NVML.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import accelerate
import datasets
import torch
import transformers
import trl

LOADED = (
    accelerate.Accelerator,
    datasets.Dataset,
    torch.Tensor,
    transformers.AutoModelForCausalLM,
    transformers.AutoModelForSequenceClassification,
    transformers.PreTrainedTokenizerFast,
    transformers.Trainer,
    trl.DPOTrainer,
    trl.RewardTrainer,
    trl.SFTTrainer,
)
"""Named because transformers and trl import a class's module when the class is first asked for."""
