"""Trains a reward model: from an instruction-tuned model, on preference pairs, to a score for prompt and answer."""
