"""python -m benchmarks: every benchmark in turn."""

from benchmarks import rollout

if __name__ == "__main__":
    rollout.main(None)
