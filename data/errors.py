"""What a user can mend in data: the message names the file, the row, the field and the fix."""

from handoff.errors import UserError


class DataError(UserError):
    """Data that cannot be read, or that does not fit what a stage wants of it."""


class RowRefused(DataError):
    """One row that cannot be used, for `reason`. Where many rows are read it is counted as dropped, not raised."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
