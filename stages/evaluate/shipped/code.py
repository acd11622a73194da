"""Programs, run against their tests in the sandbox (docs/sandbox.md).

For pass@k, sample: `num_generations: 20`, and `scores: [{function: code_tests, name: passed, pass_at: [1, 10]}]`.
"""

from stages.evaluate.shipped.declaration import GREEDY, Shipped

_PASSED = [{"function": "code_tests", "name": "passed", "on": "greedy"}]
TASKS = {
    "humaneval": Shipped(
        "functions to complete (Chen et al. 2021)",
        "{source: hub, name: openai/openai_humaneval, hub_split: test}",
        keys={
            **GREEDY,
            "prompt": "Complete this Python function. Answer with the whole function in a code block.\n\n"
            "```python\n{question}\n```",
            "max_prompt_length": 1024,
            "max_new_tokens": 768,
            "scores": _PASSED,
        },
        source={"format": "prompt_completion"},
    ),
    "mbpp": Shipped(
        "short programs (Austin et al. 2021), with their tests in the prompt",
        "{source: hub, name: google-research-datasets/mbpp, subset: full, hub_split: test}",
        keys={
            **GREEDY,
            "prompt": "{question} Answer with a code block in Python. Your code should pass these tests:\n\n"
            "{test_list}",
            "max_prompt_length": 1024,
            "max_new_tokens": 512,
            "scores": _PASSED,
        },
        source={"format": "prompt_completion", "rename": {"text": "prompt"}},
    ),
}
