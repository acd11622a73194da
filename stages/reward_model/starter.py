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
        *adapter_lines(given, 32, "the default"),
        rate_line(given, 3e-6, "3e-6: Tülu 3's reward model")
        if given.adapted
        else rate_line(given, 1e-5, "above Tülu 3's 3e-6 for 8 B: smaller models take larger rates"),
        *(
            line if line.key != "train.num_train_epochs" else Line(line.key, 1, "Tülu 3; a second pass over-fits")
            for line in batch_lines(sources, 2 * int(str(length.value)), given, 64, "as for preference tuning")
        ),
    ]
