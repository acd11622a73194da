"""Word problems and competition mathematics.

GSM8K has the prompt, the stops and the two extractions of lm-evaluation-harness's task (version 3), so that
`strict_match` and `flexible_extract` are its numbers; `accuracy` is by `numeric_match`, which also reads units,
currency and fractions. Examples before the question come from `few_shot`; the harness takes five of the training set.
"""

from stages.evaluate.shipped.declaration import GREEDY, Shipped

_STOPS = ["Question:", "</s>", "<|im_end|>"]
_IGNORED = [",", r"\$", r"\.$"]


def _extract(name: str, pattern: str, take: str) -> dict[str, object]:
    args = {"pattern": pattern, "take": take, "ignore": _IGNORED}
    return {"function": "regex_extract", "name": name, "args": args, "on": "greedy"}


TASKS = {
    "gsm8k": Shipped(
        "word problems of grade school (Cobbe et al. 2021), as plain text",
        "{source: hub, name: openai/gsm8k, subset: main, hub_split: test}",
        keys={
            **GREEDY,
            "form": "text",
            "prompt": "Question: {question}\nAnswer:",
            "stop": _STOPS,
            "max_prompt_length": 2048,
            "max_new_tokens": 256,
            "scores": [
                {"function": "numeric_match", "name": "accuracy", "on": "greedy"},
                _extract("strict_match", r"#### (\-?[0-9\.\,]+)", "first"),
                _extract("flexible_extract", r"(-?[$0-9.,]{2,})|(-?[0-9]+)", "last"),
            ],
        },
        source={"format": "gsm8k"},
    ),
    "svamp": Shipped(
        "short word problems with one step (Patel et al. 2021), as plain text",
        "{source: hub, name: ChilleD/SVAMP, hub_split: test}",
        keys={
            **GREEDY,
            "form": "text",
            "prompt": "Question: {question}\nAnswer:",
            "stop": _STOPS,
            "max_prompt_length": 1024,
            "max_new_tokens": 128,
            "scores": [{"function": "numeric_match", "name": "accuracy", "on": "greedy"}],
        },
        source={"format": "svamp"},
    ),
    "math": Shipped(
        "competition mathematics (Hendrycks et al. 2021), also MATH-500; compared by computer algebra",
        "{source: hub, name: HuggingFaceH4/MATH-500, hub_split: test}",
        keys={
            **GREEDY,
            "prompt": "{question}\n\nReason step by step, and put the final answer in \\boxed{}.",
            "group_by": "level",
            "max_prompt_length": 1024,
            "max_new_tokens": 1024,
            "scores": [{"function": "math_equal", "name": "accuracy", "args": {"column": "reference"}, "on": "greedy"}],
            "vote": "formula",
        },
        source={"format": "prompt_completion", "rename": {"problem": "prompt", "solution": "completion"}},
    ),
}
