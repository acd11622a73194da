"""Trains a tokenizer: from documents and conversations to a byte-level BPE with special tokens and a chat template."""
