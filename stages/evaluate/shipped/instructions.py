"""Instructions whose fulfillment a program can check."""

from stages.evaluate.shipped.declaration import GREEDY, Shipped

TASKS = {
    "ifeval": Shipped(
        "verifiable instructions (Zhou et al. 2023); `strict` and `loose` as in the paper, over prompts",
        "{source: hub, name: google/IFEval, hub_split: train}",
        keys={
            **GREEDY,
            "max_prompt_length": 2048,
            "max_new_tokens": 1280,
            "scores": [
                {"function": "ifeval", "name": "strict", "on": "greedy"},
                {"function": "ifeval", "name": "loose", "args": {"mode": "loose"}, "on": "greedy"},
            ],
        },
        source={"format": "prompt_completion"},
    )
}
