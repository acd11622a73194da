"""Pairs of answers, of which one is better."""

from stages.evaluate.shipped.declaration import Shipped

TASKS = {
    "rewardbench": Shipped(
        "pairs of chat, safety and reasoning (Lambert et al. 2024), by subset",
        "{source: hub, name: allenai/reward-bench, hub_split: filtered}",
        kind="preferences",
        keys={"group_by": "subset", "max_length": 4096},
        source={"format": "preference"},
    ),
    "preferences": Shipped("any pairs `chosen` and `rejected`", "", kind="preferences"),
}
