"""Generation for reinforcement learning and evaluation: prompts in, tokens and their log-probabilities out."""
