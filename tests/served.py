"""A real HTTP server on loopback that speaks OpenAI's chat protocol; what it says is a function's business."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


def picture_of(body):
    """The picture in a request, `None` if it holds none."""
    for message in body["messages"]:
        for block in message["content"] if isinstance(message["content"], list) else ():
            if block["type"] == "image_url":
                head, _, data = block["image_url"]["url"].partition(",")
                assert head == "data:image/png;base64"
                return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    return None


def text_of(message):
    content = message["content"]
    return content if isinstance(content, str) else "".join(b["text"] for b in content if b["type"] == "text")


def chat(text, body, *, usage=True, model=None):
    """An answer as the protocol has it."""
    answer = {
        "object": "chat.completion",
        "model": model or body["model"],
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
    }
    if usage:
        answer["usage"] = {"prompt_tokens": 20 + 64 * (picture_of(body) is not None)}
    return answer


class Served:
    """Runs for a block; `answer` is given a request's body and returns an answer, or `(status, content, headers)`.

    Args:
        answer (`Callable`): Content may be bytes, or anything that JSON takes.
        models: What `/v1/models` sends: names, or whatever `answer` may return.
    """

    def __init__(self, answer, models=("erased",)):
        if isinstance(models, tuple) and all(isinstance(name, str) for name in models):
            models = {"object": "list", "data": [{"id": name, "object": "model"} for name in models]}
        self.requests, self.headers = [], []
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                served.headers.append(dict(self.headers))
                self.send(models if self.path == "/v1/models" else (404, {"detail": "Not Found"}, {}))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                served.requests.append(body)
                served.headers.append(dict(self.headers))
                self.send(answer(body) if self.path == "/v1/chat/completions" else (404, {"detail": "Not Found"}, {}))

            def send(self, content):
                status, content, headers = content if isinstance(content, tuple) else (200, content, {})
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(raw)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_):
                """A test's output is no place for an access log."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        # A client that has gone away is what some tests are about.
        self._server.handle_error = lambda *_: None
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
