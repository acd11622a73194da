"""Errors that a user can fix. On such an error, a command prints only its message and exits with 2."""


class UserError(ValueError):
    """A mistake in a recipe, in data, or in how a command was called. The message names the place and the fix."""

    said = False
    """Whether another process of the run says it, so that this one stays silent."""


class HandoffError(UserError):
    """A checkpoint is missing, altered, of the wrong kind, or does not fit the stage that starts from it."""


class GateError(Exception):
    """A stage's result is below the gate that the recipe sets. Commands exit with 3."""
