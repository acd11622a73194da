"""Imports everything heavy that a stage may need; loaded by the server process from which stages are forked.

Nothing here may start a thread or use a GPU, since neither survives a fork.
"""

import os

# Makes torch count GPUs through NVML. By default it would initialise CUDA, which is then unusable in a fork.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

from training.importing import quick_imports

with quick_imports():
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
