"""Refusals. The client library chooses its exception by status and `X-Error-Code` (`utils/_http.hf_raise_for_status`)."""


class HubError(Exception):
    """Answered as `{"error": message}` with `X-Error-Code` and `X-Error-Message`; `extra` goes into the JSON, too."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra):
        super().__init__(message)
        self.status, self.message, self.code, self.extra = status, message, code, extra


class BadRequest(HubError):
    def __init__(self, message: str, **extra):
        super().__init__(400, message, **extra)
