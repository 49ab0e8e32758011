"""Asking a model that somebody serves: OpenAI's chat protocol with pictures, and what to do where it fails."""

from __future__ import annotations

import base64
import http.client
import io
import json
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from functools import cached_property

from PIL import Image

from ..data.questions import Dialogue, Question
from ..records.safe_json import parse_json


# A chat answer is short; what is longer is none.
_MOST_BYTES = 2**22
_NAMES_SHOWN = 8


class EndpointError(RuntimeError):
    """A server that could not be asked; the message says what to do."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected request would take the token to another server, and lose its question."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return None


@dataclass(frozen=True)
class Reply:
    """
    What a server answered.

    Args:
        text (`str`): The answer.
        model (`str`, *optional*): The name of the model, as the server gives it.
        prompt_tokens (`int`, *optional*): How long the prompt was, if the server says so.
    """

    text: str
    model: str | None = None
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class Endpoint:
    """
    A server that speaks OpenAI's chat protocol, e.g. vLLM, SGLang, llama.cpp, TGI or `transformers serve`.

    Args:
        url (`str`): Its address, e.g. "http://localhost:8000"; with or without `/v1` and `/chat/completions`.
        name (`str`, *optional*): The server's name of the model; by default the only one that it lists.
        token (`str`, *optional*): Sent as a bearer token.
        timeout (`float`, defaults to 120): Seconds to wait for an answer.

    Raises:
        ValueError: If the address is not one of HTTP, or the timeout is not positive.
    """

    url: str
    name: str | None = None
    token: str | None = field(default=None, repr=False)
    timeout: float = 120.0

    def __post_init__(self):
        url = self.url.rstrip("/")
        for end in ("/chat/completions", "/v1"):
            url = url.removesuffix(end)
        if not url.startswith(("http://", "https://")) or not url.partition("://")[2]:
            raise ValueError(f"the endpoint is {self.url!r}; expected an address such as http://localhost:8000.")
        if not self.timeout > 0:
            raise ValueError(f"the timeout is {self.timeout}; expected seconds > 0.")
        object.__setattr__(self, "url", url)

    @cached_property
    def listed(self) -> tuple[str, ...]:
        """The names of the models that the server lists.

        Raises:
            EndpointError: If it cannot be asked, or what it says is no list of models.
        """
        content = self._request("/v1/models")
        try:
            return tuple(str(entry["id"]) for entry in content["data"])
        except (KeyError, TypeError) as error:
            raise EndpointError(
                f"{self.url}/v1/models does not list models as OpenAI's protocol has it ({error!r:.100}): is it such a "
                "server? Give its address without a path, or name the model (--model)."
            ) from error

    @cached_property
    def model(self) -> str:
        """The name that requests carry.

        Raises:
            EndpointError: If none was given, and the server lists none or several.
        """
        if self.name is not None:
            return self.name
        if len(self.listed) != 1:
            raise EndpointError(
                f"{self.url} lists {self._names() or 'no model'}; say which one to ask (--model). A server that has loaded an "
                "adapter beside its base model lists both: ask by the adapter's name."
            )
        return self.listed[0]

    def ask(self, question: Question, image: Image.Image | None = None, *, max_tokens: int) -> Reply:
        """Asks one question about at most one image, greedily.

        Args:
            question (`str` or `Dialogue`): The question.
            image (`PIL.Image.Image`, *optional*): Sent as a PNG within the request.
            max_tokens (`int`): Longest answer.

        Raises:
            EndpointError: If there is no answer.
        """
        dialogue = question if isinstance(question, Dialogue) else Dialogue((question,))
        messages = [_message(message, image) for message in dialogue.messages(image)]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens, "stream": False}
        return self._reply(self._request("/v1/chat/completions", body))

    def _reply(self, content: dict) -> Reply:
        where = f"{self.url}/v1/chat/completions"
        if "choices" not in content:
            raise EndpointError(f"{where} sent no answer: {_said(content)}. Ask it by hand, and see its log.")
        try:
            text = content["choices"][0]["message"]["content"]
            if isinstance(text, list):
                text = "".join(block["text"] for block in text if block.get("type") == "text")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise EndpointError(
                f"{where} sent an answer that is not as OpenAI's protocol has it ({error!r:.100}): {str(content)!r:.200}."
            ) from error
        usage = content.get("usage")
        tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        # No text is what a model gives that was cut off while it thought.
        return Reply(
            "" if text is None else str(text),
            content.get("model") if isinstance(content.get("model"), str) else None,
            tokens if isinstance(tokens, int) and not isinstance(tokens, bool) else None,
        )

    def _request(self, path: str, body: dict | None = None) -> dict:
        where = self.url + path
        headers = {"Accept": "application/json", "User-Agent": "space-peft"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        data = None
        if body is not None:
            data, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        request = urllib.request.Request(where, data=data, headers=headers)
        try:
            with urllib.request.build_opener(_NoRedirects).open(request, timeout=self.timeout) as response:
                raw = response.read(_MOST_BYTES + 1)
                if response.length and len(raw) <= _MOST_BYTES:  # Announced, and not sent; `read` does not mind.
                    raise http.client.IncompleteRead(raw, response.length)
        except urllib.error.HTTPError as error:
            with error:
                raise EndpointError(self._http_error(where, error, asked=body is not None)) from error
        except TimeoutError as error:
            raise EndpointError(self._too_slow(where)) from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise EndpointError(self._too_slow(where)) from error
            raise EndpointError(
                f"{where} cannot be reached: {error.reason}. Is the server running, and the address (host and port) right?"
            ) from error
        except (http.client.HTTPException, OSError) as error:
            raise EndpointError(
                f"{where} broke off: {error!r:.200}. The server may have run out of memory; see its log."
            ) from error
        if len(raw) > _MOST_BYTES:
            raise EndpointError(f"{where} sent more than {_MOST_BYTES} bytes; an answer is never that long.")
        try:
            return parse_json(raw, where=f"what {where} sent", remedy="Does it speak OpenAI's protocol?")
        except ValueError as error:
            raise EndpointError(f"{error} It begins with {raw[:80]!r}.") from error

    def _too_slow(self, where: str) -> str:
        return (
            f"{where} did not answer within {self.timeout:g} s. The first request may have to load the model: wait, and try "
            "again, or allow more (--timeout)."
        )

    def _http_error(self, where: str, error: urllib.error.HTTPError, *, asked: bool) -> str:
        try:
            raw = error.read(4096)
        except (http.client.HTTPException, OSError):
            raw = b""
        try:
            said = _said(json.loads(raw))
        except ValueError:
            said = repr(raw.decode(errors="replace").strip())[:300]
        text = f"{where} answered with HTTP status {error.code} ({error.reason}): {said}. "
        if error.code in (401, 403):
            return text + (
                "It wants a token: put it into an environment variable and give that one's name (--token-env)."
                if not self.token
                else "It does not take the token; see the environment variable that --token-env names."
            )
        if error.code in (301, 302, 303, 307, 308):
            return text + f"It sends to {error.headers.get('Location')!r}; give that address if it is the one you mean."
        if error.code in (429, 503):
            return text + "It is busy, or still loading the model: wait, and try again."
        if error.code == 413:
            return text + "The pictures are too large for it: allow larger requests, or take smaller pictures."
        if not asked:
            return (
                text
                + "Is the address right? It must be that of a server that speaks OpenAI's protocol; or name the model (--model)."
            )
        return f"{text}The model asked was {self.model!r}{self._hint()}"

    def _hint(self) -> str:
        """The names that the server knows, if it lists them."""
        try:
            names = self._names()
        except EndpointError:
            return ". See whether the server has it under this name (--model), and whether it takes pictures."
        if self.model in self.listed:
            return ", which the server lists. See whether that model takes pictures, and the server's log."
        return f"; the server lists {names or 'no model'}. Give one of its names (--model)."

    def _names(self) -> str:
        names = ", ".join(map(repr, self.listed[:_NAMES_SHOWN]))
        more = len(self.listed) - _NAMES_SHOWN
        return f"{names} and {more} more" if more > 0 else names


def _said(content) -> str:
    """A server's own words of what went wrong."""
    if isinstance(content, dict):
        for key in ("error", "detail", "message"):
            if content.get(key):
                inner = content[key]
                return _said(inner) if isinstance(inner, dict) else f"{str(inner)!r:.300}"
    return f"{str(content)!r:.300}"


def _message(message: dict, image: Image.Image | None) -> dict:
    """A message of ours as the protocol has it: pictures by URL, text without them as one string."""
    blocks = message["content"]
    if not any(block["type"] == "image" for block in blocks):
        # Some servers take a list of blocks from a user only.
        return {"role": message["role"], "content": "".join(block["text"] for block in blocks)}
    content = [
        {"type": "image_url", "image_url": {"url": _data_url(image)}} if block["type"] == "image" else block
        for block in blocks
    ]
    return {"role": message["role"], "content": content}


def _data_url(image: Image.Image | None) -> str:
    """The picture itself, without loss."""
    assert image is not None  # A message shows one where its row has one.
    file = io.BytesIO()
    image.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
