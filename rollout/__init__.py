"""Generation for reinforcement learning and evaluation: samples completions and their log-probabilities."""
