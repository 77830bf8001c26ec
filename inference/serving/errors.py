"""The API's errors: requests that are refused, and answers that cannot go on."""

from typing import Any


class ApiError(Exception):
    """An error with its HTTP status and the fields of OpenAI's error object."""

    def __init__(
        self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None,
        kind: str = "invalid_request_error", headers: dict[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.param, self.status, self.code, self.kind, self.headers = param, status, code, kind, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def busy(why: str) -> ApiError:
    return ApiError(f"{why}; try again later", status=429, kind="rate_limit_error", code="queue_full",
                    headers={"Retry-After": "1"})  # fmt: skip


def unavailable(why: str) -> ApiError:
    return ApiError(why, status=503, kind="server_error", code="unavailable", headers={"Retry-After": "5"})
