"""Faults a test asks for. They strike by count, never by chance."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Fault:
    """What goes wrong with the requests of one route; the fields combine where that makes sense.

    Args:
        route: Name of the route, as in [`Hub.requests`]; `"*"` for any.
        times: How many requests are struck; `None` for all.
        after: How many requests of the route pass before the first one is struck.
        method: Only requests with this method, e.g. `"HEAD"`.
        status, message, code, headers: Answer this error instead of handling the request.
        before: Called before the request is handled, e.g. to let somebody else commit first.
        delay: Seconds to wait before the answer.
        cut_request_after: Close the connection when that many bytes of the request's body have been read.
        lose_reply: Handle the request, then close the connection without an answer.
        cut_reply_after: Close the connection after that many bytes of the answer's body; `Content-Length` promises all.
        bytes_per_second: Send the answer's body this slowly.
    """

    route: str
    times: int | None = 1
    after: int = 0
    method: str | None = None
    status: int | None = None
    message: str = "Injected by the test."
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    before: Callable[[], object] | None = None
    delay: float = 0.0
    cut_request_after: int | None = None
    lose_reply: bool = False
    cut_reply_after: int | None = None
    bytes_per_second: int | None = None
    struck: int = 0

    def applies(self, route: str, method: str) -> bool:
        return self.route in ("*", route) and self.method in (None, method)


class Faults:
    """The faults that wait; `hub.faults.add(route="commit", status=500)` adds one and returns it."""

    def __init__(self):
        self._lock = threading.Lock()
        self.waiting: list[Fault] = []

    def add(self, route: str, **options) -> Fault:
        fault = Fault(route, **options)
        with self._lock:
            self.waiting.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            self.waiting.clear()

    def take(self, route: str, method: str) -> Fault | None:
        """The first fault for this request. Every fault counts the requests that pass it by."""
        with self._lock:
            for fault in self.waiting:
                if not fault.applies(route, method) or (fault.times is not None and fault.struck >= fault.times):
                    continue
                if fault.after > 0:
                    fault.after -= 1
                    continue
                fault.struck += 1
                return fault
        return None
