"""Benchmarks: each runs Baton and a peer alternately, in one run, and prints the ratio. `make bench` runs them all."""

from training.threads import settle

settle()
