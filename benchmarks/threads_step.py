"""Prints the seconds of a training step, for `benchmarks.threads`.

It is run by its path, so that the package `benchmarks` does not set OpenMP's variables.

    python benchmarks/threads_step.py THREADS
"""

import json
import statistics
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

STEPS, WARM_UP = 20, 3

if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(int(sys.argv[1]))
    config = LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, config.vocab_size, (8, 128))
    seconds = []
    for _ in range(WARM_UP + STEPS):
        started = time.perf_counter()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    print(json.dumps(statistics.median(seconds[WARM_UP:])))
