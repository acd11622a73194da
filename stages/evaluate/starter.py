"""The section of this stage that `baton init` writes."""

from training.starter import Given, Line, tokens


def section(given: Given) -> list[Line]:
    """The keys with their reasons; none if no rows are held out."""
    sources = [one for one in given.data if one.holdout]
    if not sources:
        return []
    checks = dict.fromkeys(one.reward for one in sources if one.reward is not None)
    scores = [
        *([f"{{model: {given.scorer}, reencode: true}}"] if given.scorer else []),
        *(str(check) for check in checks),
    ]
    prompt = tokens(max(one.prompt for one in sources), given, share=0.5)
    return [
        Line("models", [*given.policies], "before and after each training"),
        Line("tasks[].name", "held_out", "docs/stages/evaluate.md has more tasks: GSM8K, MMLU, documents, ..."),
        Line("tasks[].data", [one.part("test") for one in sources], "prompts of rows that no section has trained on"),
        *([Line("tasks[].scores", scores, "with their 95 % intervals")] if scores else []),
        Line("tasks[].max_prompt_length", prompt, "the longest prompt looked at fits"),
        Line("tasks[].max_new_tokens", 256, "answers that are longer count as not stopped"),
    ]
