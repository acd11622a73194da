"""Errors in data that a user can fix: the message names the file, the row, the field and the fix."""

from handoff.errors import UserError


class DataError(UserError):
    """Data that cannot be read, or that a stage cannot use."""


class RowRefused(DataError):
    """One row that cannot be used, for `reason`. Code that reads many rows counts it as dropped and goes on."""

    def __init__(self, reason: str, mend: str = "") -> None:
        """`reason` is part of a metric's name; `mend` says what the user can do, where that is not plain."""
        super().__init__(f"{reason}; {mend}" if mend else reason)
        self.reason, self.mend = reason, mend


class TemplateFailed(RowRefused):
    """A chat template with a mistake of its own, or that needs too much time or memory. Code that reads many rows stops
    and names the row, because the next rows would meet the same mistake."""
