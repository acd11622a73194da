"""The charts and the section of a policy-gradient stage in the report. Metrics have TRL's names. No torch here."""

from training.declaration import Chart, Line, PartsChart, PathChart, Section, held_out

CHARTS = (
    Chart("Score", (Line("objective/scores", "sampled"), held_out("eval/scores")), "of an answer, all rewards summed"),
    Chart(
        "Monitor",
        (held_out("eval/monitor"), held_out("eval/length_controlled_scores", "score at constant length")),
        "not trained on; falling while the score rises is over-optimisation",
    ),
    Chart("KL from the parent", (Line("objective/kl", "sampled"), held_out("eval/kl")), "nats per answer"),
    Chart("Answer length", (Line("completions/mean_length", "sampled"), held_out("eval/mean_length")), "tokens"),
    Chart("Entropy", (Line("objective/entropy", "entropy"),), "nats per answer; a fall to zero is collapse"),
    Chart(
        "Repetition",
        (Line("completions/repetition", "sampled"), held_out("eval/repetition")),
        "share of an answer's 4-grams that occurred in it before",
    ),
    Chart("Prompts without signal", (Line("frac_reward_zero_std", "share"),), "all answers had the same reward"),
    Chart(
        "Disagreement",
        (Line("objective/disagreement", "deviation"),),
        "of the ensemble's members on an answer",
    ),
    Chart(
        "Answers cut off",
        (Line("completions/clipped_ratio", "share"),),
        "share that did not end with a stop token",
    ),
    Chart("Score less KL penalty", (Line("objective/rlhf_reward", "reward"),), "what the policy is trained on"),
    Chart("Critic's loss", (Line("loss/value_avg", "value loss"),), "squared error of the predicted return"),
    Chart(
        "Critic's explained variance",
        (Line("val/explained_variance", "explained variance"),),
        "share of the returns' variance that it explains",
    ),
    Chart(
        "Clipped share",
        (Line("policy/clipfrac_avg", "policy"), held_out("val/clipfrac_avg", "critic")),
        "of tokens whose update hit the clip range",
    ),
    Chart(
        "KL of one update",
        (Line("policy/approxkl_avg", "KL"),),
        "from the policy that sampled the answers to the updated one",
    ),
)

SECTION = Section(
    lede="What the policy earned on its own answers, and how far it moved from {parent} to earn it.",
    x_label="iteration",
    path=PathChart(
        "Reward against KL",
        x="objective/kl",
        y="objective/scores",
        x_label="KL from the parent, nats",
        y_label="score",
        note="up and left is better: more reward for less change",
    ),
    parts=PartsChart("Rewards by source", "rewards/", "before their weights"),
    phases=("generate", "score", "value", "policy", "reference", "exchange", "advantage", "train", "sync", "save"),
)
