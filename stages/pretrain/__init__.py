"""Pretrains a causal language model: from a tokenizer (random weights) or a checkpoint, on documents."""
