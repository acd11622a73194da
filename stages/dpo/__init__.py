"""Direct preference optimisation: from an instruction-tuned model, on preference pairs, to an aligned one."""
