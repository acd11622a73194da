"""Generation: from a language model and prompts to rows of sampled answers that other stages read as data."""
