"""Proximal policy optimisation: from an instruction-tuned policy and a reward model to an aligned policy."""
