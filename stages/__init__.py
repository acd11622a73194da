"""One package for each stage of a model's upbringing, and nothing else. What stages share is in `training/`."""
