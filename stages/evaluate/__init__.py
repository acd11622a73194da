"""Evaluation: compares the models of a run in one table, with 95 % intervals."""
