"""The section of this stage that `baton init` writes."""

from training.starter import (
    Given,
    Line,
    adapter_lines,
    batch_lines,
    data_lines,
    length_line,
    parent_line,
    rate_line,
    tokens,
)


def section(given: Given) -> list[Line]:
    """The keys with their reasons; none if there are no answers to learn from."""
    sources = given.of("conversations", "pairs")
    if not sources:
        return []
    length = length_line(sources, given)
    answer = min(256, tokens(max(one.answer for one in sources), given))
    why = "conversations"
    if sources[0].kind == "pairs":
        why = "the chosen answers of the pairs, as Rafailov et al. 2023 do where there are no conversations"
    small = "five times the default, which is for models of 1 B and more: smaller models take larger rates"
    rate = rate_line(given, 2e-5, "2e-5: Zephyr, SmolLM3, OLMo 2") if given.adapted else rate_line(given, 1e-4, small)
    return [
        parent_line(given),
        *data_lines(sources, why),
        length,
        Line("max_new_tokens", answer, "of the answers to held-out prompts, by which the stop rate is measured"),
        *adapter_lines(given, 32, "the default; LoRA Without Regret: take 64 to 256 for 100,000 rows and more"),
        rate,
        *batch_lines(sources, int(str(length.value)), given, 128, "Tülu 3 and SmolLM3"),
    ]
