"""Generation: samples a language model's answers to prompts, as rows that other stages read as data."""
