"""Benchmarks: each runs us and a peer in turns, in one run, and prints the ratio. `make bench` runs them all."""
