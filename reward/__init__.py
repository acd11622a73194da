"""Reward functions: the learned reward model, plain callables, and their weighted composition."""
