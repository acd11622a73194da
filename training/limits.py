"""How long rows may be: what the recipe allows, or the windows of the models that read them."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from handoff.parent import Parent
from handoff.window import model_window
from training.recipe import RecipeError

if TYPE_CHECKING:
    from training.run import Run


def within_window(run: "Run", parents: Iterable[Parent], key: str, asked: int, answer: int = 0) -> int:
    """`asked` tokens, or what the models' windows leave if that is less, which is said. Longer rows are handled as
    those are that exceed the recipe's number.

    Args:
        run: the stage's run.
        parents: the models that read the rows.
        key: the recipe's key of `asked`, for the message.
        asked: tokens of a row, or of a prompt.
        answer: tokens that come after it.

    Raises:
        RecipeError: the answer alone fills a window.
    """
    least = asked
    for parent in parents:
        found = model_window(parent.weights_dir)
        if found is None or found.tokens - answer >= least:
            continue
        least = found.tokens - answer
        place = f"the window of {parent.name}, {found.tokens} tokens ({found.key} in its config.json)"
        if least < 1:
            raise RecipeError(
                f"{run.recipe.path}: {run.section.name}: answers of {answer} tokens leave no room for a prompt "
                f"in {place}; allow fewer tokens of an answer"
            )
        rest = f" less the {answer} of an answer" if answer else ""
        run.console.print(f"  {key} is {least} here, not {asked}: {place}{rest}")
    return least
