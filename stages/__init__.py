"""One package for each stage of the upbringing, and what they share: recipe, runtime, models, callbacks."""
