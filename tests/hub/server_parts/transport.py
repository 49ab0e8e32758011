"""HTTP: reads a request, finds its route, applies the test's faults, sends the answer."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from .errors import HubError


@dataclass
class Request:
    """A request as it came in, kept in the log. `status` is what was answered; `None` if nothing was."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]  # Names in lower case.
    route: str = "unknown"
    body: bytes = field(default=b"", repr=False)
    status: int | None = None

    def json(self):
        return json.loads(self.body)

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")


@dataclass
class Reply:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def json_reply(value, status: int = 200, **headers: str) -> Reply:
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=utf-8", **headers})


def error_reply(error: HubError) -> Reply:
    headers = {"X-Error-Message": error.message.replace("\n", " ").encode("ascii", "replace").decode()}
    if error.code:
        headers["X-Error-Code"] = error.code
    return json_reply({"error": error.message, **error.extra}, error.status, **headers)


class Routes:
    """Handlers by method and path; names are what faults and tests refer to."""

    def __init__(self):
        self.entries: list[tuple[str, frozenset[str], re.Pattern, Callable]] = []

    def add(self, name: str, methods: str, pattern: str):
        """Decorator: `handler(hub, request, **groups of the pattern)` returns a [`Reply`] or something for JSON."""

        def decorate(handler):
            self.entries.append((name, frozenset(methods.split()), re.compile(pattern), handler))
            return handler

        return decorate

    def find(self, method: str, path: str):
        for name, methods, pattern, handler in self.entries:
            match = pattern.fullmatch(path)
            if match and method in methods:
                return name, handler, {key: unquote(value or "") for key, value in match.groupdict().items()}
        return "unknown", None, {}


class Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # With 1.0 every request would open a connection of its own.
    disable_nagle_algorithm = True
    server: Listener

    def log_message(self, format, *args):
        """Requests are in `Hub.requests`; nothing is printed."""

    def answer(self) -> None:
        url, hub = urlsplit(self.path), self.server.hub
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, unquote(url.path), parse_qs(url.query), headers)
        request.route, handler, groups = self.server.routes.find(self.command, url.path)
        fault = hub.faults.take(request.route, self.command)
        hub.requests.append(request)
        if fault and fault.cut_request_after is not None:
            self._read(fault.cut_request_after)
            return self._hang_up()
        request.body = self._read()
        if request.body is None:  # The client went away.
            return self._hang_up()
        if fault and fault.before:
            fault.before()
        if fault and fault.status:
            reply = error_reply(HubError(fault.status, fault.message, fault.code))
            reply.headers.update(fault.headers)
        else:
            reply = self._handle(hub, request, handler, groups)
        if fault and fault.delay:
            time.sleep(fault.delay)
        if fault and fault.lose_reply:
            return self._hang_up()
        request.status = reply.status
        self._send(reply, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def _handle(self, hub, request: Request, handler, groups: dict[str, str]) -> Reply:
        if handler is None:
            return json_reply({"error": f"This server does not know {request.method} {request.path}"}, 404)
        try:
            with hub.lock:  # One request at a time changes what is stored.
                value = handler(hub, request, **groups)
        except HubError as error:
            return error_reply(error)
        return value if isinstance(value, Reply) else json_reply(value)

    def _read(self, limit: int | None = None) -> bytes | None:
        """The request's body, or its first `limit` bytes; `None` if the connection breaks off before its end."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = b""
            while limit is None or len(parts) < limit:
                size = int(self.rfile.readline().split(b";")[0] or b"0", 16)
                parts += self.rfile.read(size)
                self.rfile.readline()
                if size == 0:
                    break
            return parts
        expected = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(expected if limit is None else min(limit, expected))
        return body if limit is not None or len(body) == expected else None

    def _send(self, reply: Reply, fault) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in reply.headers:
            self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        body = b"" if self.command == "HEAD" else reply.body
        try:
            if fault and fault.cut_reply_after is not None:
                self.wfile.write(body[: fault.cut_reply_after])
                return self._hang_up()
            if fault and fault.bytes_per_second:
                step = max(1, fault.bytes_per_second // 20)
                for start in range(0, len(body), step):
                    self.wfile.write(body[start : start + step])
                    time.sleep(step / fault.bytes_per_second)
            else:
                self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # The client gave up waiting: its right.

    def _hang_up(self) -> None:
        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # The client was faster.


class Listener(ThreadingHTTPServer):
    """A server on a free port of the loopback interface, in a thread of its own."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub, routes: Routes):
        super().__init__(("127.0.0.1", 0), Connection)
        self.hub, self.routes = hub, routes
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def handle_error(self, request, client_address):
        """Keeps what a handler raised, for the test to fail on; broken connections are part of the business."""
        import sys

        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            self.hub.errors.append(error)

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()
