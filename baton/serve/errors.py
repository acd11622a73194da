"""A request that is refused. No torch here."""

from typing import Any


class Refused(Exception):
    """The request gets this status, and OpenAI's form of an error with the field that it is about."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {} if retry is None else {"Retry-After": str(retry)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def body(self) -> dict[str, Any]:
        """The JSON of the reply."""
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def wrong(field: str, message: str, code: str | None = None) -> Refused:
    """400 about one field."""
    return Refused(400, f"{field}: {message}", field, code or "invalid_value")
