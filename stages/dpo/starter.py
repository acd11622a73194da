"""The section of this stage that `baton init` writes."""

from training.starter import Given, Line, adapter_lines, batch_lines, data_lines, length_line, parent_line, rate_line


def section(given: Given) -> list[Line]:
    """The keys with their reasons; none if there are no pairs."""
    sources = given.of("pairs")
    if not sources:
        return []
    length = length_line(sources, given)
    return [
        parent_line(given),
        *data_lines(sources, "a prompt, a better and a worse answer"),
        length,
        Line("beta", 0.1, "Rafailov et al. 2023; larger keeps the policy closer to its parent"),
        *adapter_lines(given, 16, "LoRA Without Regret: small ranks suffice for what preferences say"),
        rate_line(given, 1e-6, "1e-6: SmolLM3, OLMo 2"),
        *batch_lines(sources, 2 * int(str(length.value)), given, 64, "between Zephyr (32) and Tülu 3 (128)"),
    ]
