"""Evaluation: from the models of a run to one table of what each stage brought, with 95 % intervals."""
