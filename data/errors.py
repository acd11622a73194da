"""Errors in data that a user can fix: the message names the file, the row, the field and the fix."""

from handoff.errors import UserError


class DataError(UserError):
    """Data that cannot be read, or that a stage cannot use."""


class RowRefused(DataError):
    """One row that cannot be used, for `reason`. Code that reads many rows counts it as dropped and goes on."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
