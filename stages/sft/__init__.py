"""Instruction tuning: from a causal language model, on conversations, to one that answers and stops."""
