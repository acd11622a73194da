"""Multiple choice, by the likelihood of the choices: the prompts of lm-evaluation-harness's tasks of these names."""

from stages.evaluate.shipped.declaration import Shipped

TASKS = {
    "mmlu": Shipped(
        "57 subjects (Hendrycks et al. 2021), by the letter",
        "{source: hub, name: cais/mmlu, subset: all, hub_split: test}",
        kind="choices",
        keys={
            "intro": "The following are multiple choice questions (with answers) about {subject:words}.\n\n",
            "prompt": "{question:strip}\n{choices}\nAnswer:",
            "answer": "letter",
            "group_by": "subject",
        },
        source={"format": "multiple_choice"},
    ),
    "arc_easy": Shipped(
        "science questions of grade school (Clark et al. 2018), the easy ones",
        "{source: hub, name: allenai/ai2_arc, subset: ARC-Easy, hub_split: test}",
        kind="choices",
        source={"format": "multiple_choice"},
    ),
    "arc_challenge": Shipped(
        "science questions of grade school (Clark et al. 2018), the hard ones",
        "{source: hub, name: allenai/ai2_arc, subset: ARC-Challenge, hub_split: test}",
        kind="choices",
        source={"format": "multiple_choice"},
    ),
    "hellaswag": Shipped(
        "how an everyday scene goes on (Zellers et al. 2019)",
        "{source: hub, name: Rowan/hellaswag, hub_split: validation}",
        kind="choices",
        keys={"prompt": "{activity_label}: {ctx_a} {ctx_b:capitalize}", "clean": "wikihow"},
        source={"format": "multiple_choice"},
    ),
}
