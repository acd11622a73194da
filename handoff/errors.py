"""Errors that a user can mend. A command that meets one prints its message alone and exits with 2."""


class UserError(ValueError):
    """A mistake in a recipe, in data, or in how a command was called. The message names the place and the fix."""


class HandoffError(UserError):
    """A checkpoint is missing, altered, of the wrong kind, or does not fit the stage that was to start from it."""


class GateError(Exception):
    """A stage ran, and its result is below what the recipe demands. Commands exit with 3."""
