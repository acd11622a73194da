"""Two processes exchange columns of different lengths: python -m tests.exchanging, with a two-process launch file."""

import torch

from training import engines
from training.engines.exchange import join_rows


def columns(rank: int) -> dict[str, torch.Tensor]:
    """Columns of every type that trajectories have. Process 1 has longer, shorter and empty ones than process 0."""
    rows = (3, 5)[rank]
    return {
        "ids": torch.arange(7 * rows, dtype=torch.int32) + 100 * rank,
        "mask": torch.arange(rows) % 2 == rank,
        "end": torch.full((4 - 3 * rank,), rank, dtype=torch.int8),
        "logp": torch.full((rows,), 1 / 3 + rank),
        "parts": torch.tensor([[0.1, float("nan")]] * rows, dtype=torch.float64).mT.contiguous().mT,
        "nobody": torch.empty(0, 3),
        "first": torch.arange(2 * (1 - rank)),
    }


def check(engine: engines.Engine) -> None:
    """Raises AssertionError if a joined column is not the concatenation of both processes' columns by rank."""
    found = join_rows(engine, columns(engine.data_rank))
    for name, expected in ((n, torch.cat([columns(rank)[n] for rank in range(2)])) for n in columns(0)):
        assert found[name].dtype == expected.dtype, name
        torch.testing.assert_close(found[name], expected, rtol=0, atol=0, equal_nan=True)
    kept = join_rows(engine, columns(engine.data_rank), lambda _, rows: rows[:1].clone())
    assert kept["ids"].tolist() == [0] and kept["first"].tolist() == [0]


if __name__ == "__main__":
    engine = engines.start()
    check(engine)
    engine.shutdown()
