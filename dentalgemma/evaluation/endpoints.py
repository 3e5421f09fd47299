"""Ask a model behind an HTTP endpoint: OpenAI's chat completions, as vLLM speaks them, or Anthropic's messages."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Literal, NamedTuple

import httpx2

from dentalgemma.evaluation.questions import EvaluationError

Api = Literal["openai", "anthropic"]
VENDORS = {"openai": "https://api.openai.com/v1", "anthropic": "https://api.anthropic.com/v1"}
KEY_VARIABLES = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
PATHS = {"openai": "/chat/completions", "anthropic": "/messages"}
ANTHROPIC_VERSION = "2023-06-01"
ANTHROPIC_MAX_TOKENS = 1024  # its API wants a limit; this one where the caller names none
ANTHROPIC_FINISH = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length"}
DROPPABLE = ("seed", "temperature", "top_p", "top_k")  # some models take none; the others change what is asked
RETRIED = (408, 429, 500, 502, 503, 504, *range(520, 525), 529)  # 520 to 524 are Cloudflare's
LONGEST_WAIT = 300.0  # seconds, whatever the server asks for
JITTER = 0.25  # a wait is longer by up to this share, so that workers do not come back all at once
LARGEST_BODY = 16 * 2**20  # bytes
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no UTF-8 file can hold
SHORTEST_SECRET = 8  # vLLM's dummies such as EMPTY are no secret, and may well stand in an answer


class EndpointError(EvaluationError):
    """No answer, after all retries or where none would help; `status` is the HTTP status of the last try, if any."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class EndpointClosed(EndpointError):
    """The endpoint was closed while this was under way: nothing is known of the answer."""


class Reply(NamedTuple):
    """One answer. `text` may be empty, as of a model that spent `max_tokens` on reasoning.

    `requested` are the parameters asked for, `honoured` those sent in the request that was answered: what a server
    refuses is left out there, what it ignores in silence is not known. `usage` counts input_tokens and output_tokens,
    as far as told. `seconds` holds waits and retries.
    """

    text: str
    finish_reason: str | None
    usage: dict[str, int]
    requested: dict
    honoured: dict
    model: str | None
    seconds: float
    attempts: int


class _Unavailable(Exception):
    """A failure that may pass; `retry_after` are the seconds that the server asks to wait."""

    def __init__(self, reason: str, *, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.retry_after = retry_after


class _RefusedParameter(Exception):
    """The server takes the request only without the parameter of this name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def open_endpoint(
    url: str | None,
    model: str,
    *,
    api: Api = "openai",
    key_variable: str | None = None,
    timeout: float = 120,
    retries: int = 5,
) -> Endpoint:
    """An endpoint whose key comes from the environment; without a URL it is the vendor's own.

    OPENAI_API_KEY and ANTHROPIC_API_KEY go to their vendors alone; for any other server `key_variable` names the
    variable to read, so that a key is never sent where it does not belong.

    Raises:
        EndpointError: for a URL or key that cannot be used, or a variable that is not set.
    """
    if api not in VENDORS:
        raise EndpointError(f"no API {api!r}; choose openai or anthropic")
    vendor = VENDORS[api].removesuffix("/v1") + "/"
    at_vendor = f"{url or vendor}/".startswith(vendor)
    variable = key_variable or (KEY_VARIABLES[api] if at_vendor else None)
    key = os.environ.get(variable, "").strip() if variable else None
    if variable and not key:
        raise EndpointError(f"the environment variable {variable} is not set; export it with the key of the endpoint")
    return Endpoint(url or VENDORS[api], model, api=api, api_key=key, timeout=timeout, retries=retries)


@dataclass(frozen=True)
class Endpoint:
    """A model at a URL such as http://localhost:8000/v1 (`/v1` is added to a bare host). Threads may share it.

    `timeout` are the seconds that one try may take in all, `retries` how often a failed one is repeated, `backoff` the
    first wait in seconds, which doubles each time; a server's Retry-After goes first. `jitter` draws from 0 to 1.
    """

    url: str
    model: str
    api: Api = "openai"
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 120
    retries: int = 5
    backoff: float = 1.0
    jitter: Callable[[], float] = field(default=random.random, repr=False, compare=False)
    _client: httpx2.Client = field(init=False, repr=False, compare=False)
    _refused: set[str] = field(init=False, repr=False, compare=False, default_factory=set)
    _closed: threading.Event = field(init=False, repr=False, compare=False, default_factory=threading.Event)
    _connections: _Connections = field(init=False, repr=False, compare=False, default_factory=lambda: _Connections())

    def __post_init__(self) -> None:
        if self.api not in VENDORS:
            raise EndpointError(f"no API {self.api!r}; choose openai or anthropic")
        object.__setattr__(self, "url", _clean_url(self.url, self.api))
        object.__setattr__(self, "_client", _open_client(self.api, self.api_key, self.timeout))

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close connections, and end at once what other threads ask or wait for: with `EndpointClosed`."""
        self._closed.set()
        self._connections.shut()
        self._client.close()

    def complete(self, messages: Sequence[Mapping], *, system: str | None = None, **parameters: object) -> Reply:
        """Answer a conversation in OpenAI's form; parameters that are None are not sent.

        Statuses 408, 429, 500, 502 to 504, 520 to 524 and 529, timeouts, broken connections and bodies that are cut off
        are tried again with identical parameters. A decoding parameter that the server refuses by name is left out from
        then on.

        Raises:
            EndpointError: after the last retry, or at once where a retry cannot help.
        """
        began = time.monotonic()
        requested = {name: value for name, value in parameters.items() if value is not None}
        attempts = failures = 0
        while True:
            honoured = self._accepted(requested)
            attempts += 1
            try:
                answer = self._post(write_request(self.api, self.model, messages, system=system, parameters=honoured))
                text, finish_reason, usage, model = _READERS[self.api](answer)
            except _RefusedParameter as refusal:
                self._refused.add(refusal.name)
            except _Unavailable as failure:
                failures += 1
                if failures > self.retries:
                    raise EndpointError(
                        f"{self.url}: no answer from {self.model} in {attempts} tries; the last one: {failure}",
                        status=failure.status,
                    ) from None
                self._wait(failure, failures)
            else:
                seconds = round(time.monotonic() - began, 6)
                return Reply(text, finish_reason, usage, requested, honoured, model, seconds, attempts)

    def _accepted(self, requested: Mapping[str, object]) -> dict:
        """The parameters to send: without those refused before, and under the names that this API has for them."""
        accepted = {name: value for name, value in requested.items() if name not in self._refused}
        if "max_tokens" in requested and "max_tokens" in self._refused:  # OpenAI's reasoning models renamed it
            accepted["max_completion_tokens"] = requested["max_tokens"]
        if self.api == "anthropic":
            accepted.pop("seed", None)  # there is none in this API
            accepted.setdefault("max_tokens", ANTHROPIC_MAX_TOKENS)
        return accepted

    def _wait(self, failure: _Unavailable, failures: int) -> None:
        seconds = pause(failures, backoff=self.backoff, retry_after=failure.retry_after, jitter=self.jitter())
        if self._closed.wait(seconds):
            raise EndpointClosed(f"{self.url}: closed while waiting to try again; the last try: {failure}")

    def _post(self, body: dict) -> dict:
        """Send one request and return its JSON; failures become one of the three errors above."""
        try:
            response, content = self._exchange(body)
        except Exception as error:
            if self._closed.is_set():  # under the request, which may then fail in any way
                raise EndpointClosed(f"{self.url}: closed while the request was under way") from None
            if isinstance(error, (httpx2.TransportError, httpx2.DecodingError)):
                said = self._scrub(str(error)) or "no answer in time"
                raise _Unavailable(f"{type(error).__name__}: {said}") from None
            raise
        answer = self._parse(content)
        if response.status_code != 200:
            raise self._explain(response, answer, parameters=body)
        if not isinstance(answer, dict):
            raise _Unavailable(f"the body of {len(content)} bytes is not a JSON object", status=200)
        if isinstance(answer.get("error"), (dict, str)):
            raise _Unavailable(f"status 200 without an answer: {_error_text(answer)}", status=200)
        return answer

    def _exchange(self, body: dict) -> tuple[httpx2.Response, bytes]:
        """One request and its body; the timeout of the client is of each read, so the whole has its own deadline."""
        deadline = time.monotonic() + self.timeout
        chunks, size = [], 0
        watched = {"trace": self._connections.watch}
        with self._client.stream("POST", self.url + PATHS[self.api], json=body, extensions=watched) as response:
            for chunk in response.iter_bytes():
                chunks.append(chunk)
                size += len(chunk)
                if size > LARGEST_BODY:
                    raise EndpointError(
                        f"{self.url}: the answer is larger than {LARGEST_BODY:,} bytes; no chat completion is",
                        status=response.status_code,
                    )
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout(f"the body was not complete after {self.timeout:g} s")
        return response, b"".join(chunks)

    def _parse(self, content: bytes) -> object:
        """The JSON of a body, or its text where it is none; neither the key nor half a character gets past here."""
        text = self._scrub(content.decode("utf-8", errors="replace"))
        try:
            # Written and read again, since escapes (\ud83d) become what they stand for only by reading.
            return json.loads(self._scrub(json.dumps(json.loads(text), ensure_ascii=False)))
        except (ValueError, RecursionError):  # also numbers of thousands of digits, and brackets in brackets
            return text

    def _explain(self, response: httpx2.Response, body: object, *, parameters: Mapping[str, object]) -> Exception:
        """What a status other than 200 means: try again, leave a parameter out, or give up with a remedy."""
        status, reason = response.status_code, _error_text(body)
        if status in RETRIED and "insufficient_quota" not in str(body):
            wait = _retry_after(response.headers.get("retry-after"))
            return _Unavailable(f"status {status}: {reason}", status=status, retry_after=wait)
        if status in (401, 403):  # what the server says may quote the key
            remedy = "wants a key; give --key-variable the name of the environment variable that holds it"
            said = "refuses the key" if self.api_key else remedy
            return EndpointError(f"{self.url}: the server {said} (status {status})", status=status)
        if status == 404:
            remedy = "check the URL, which ends in /v1 on most servers, and the model's name"
            return EndpointError(
                f"{self.url}: no model {self.model} there (status 404: {reason}); {remedy}", status=404
            )
        if 300 <= status < 400:
            return EndpointError(
                f"{self.url}: redirects elsewhere (status {status}); give the final URL", status=status
            )
        if status in (400, 422):
            refused = _refused_parameter(body, parameters, api=self.api)
            if refused:
                return _RefusedParameter(refused)
        return EndpointError(f"{self.url}: the request was refused (status {status}): {reason}", status=status)

    def _scrub(self, text: str) -> str:
        """Whatever a server sends back, the key does not reach a file or a message, nor does half a character."""
        secret = self.api_key or ""
        text = text.replace(secret, "[key]") if len(secret) >= SHORTEST_SECRET else text
        return LONE_SURROGATE.sub("\ufffd", text)


class _Connections:
    """The sockets of a client, to be shut from another thread: merely closed, they would not wake one that reads."""

    def __init__(self) -> None:
        self._streams: weakref.WeakSet = weakref.WeakSet()
        self._shut = False
        self._lock = threading.Lock()

    def watch(self, event: str, info: Mapping) -> None:
        """Hear of a new connection, as a request's `trace` extension tells."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            with self._lock:
                self._streams.add(info["return_value"])
            if self._shut:
                self.shut()

    def shut(self) -> None:
        """Shut all there are, and those still to come."""
        self._shut = True
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            with suppress(OSError):  # closed already
                socket.socket.shutdown(stream.get_extra_info("socket"), socket.SHUT_RDWR)  # under TLS, which may block


def pause(failures: int, *, backoff: float, retry_after: float | None, jitter: float) -> float:
    """Seconds to wait after so many failures; a Retry-After of 0 gives no leave to ask without end or pause."""
    seconds = retry_after or backoff * 2 ** (failures - 1)
    return min(seconds * (1 + JITTER * jitter), LONGEST_WAIT)


def write_request(
    api: Api, model: str, messages: Sequence[Mapping], *, system: str | None, parameters: Mapping[str, object]
) -> dict:
    """The body of a request; `messages` in OpenAI's form are translated for Anthropic."""
    if api == "openai":
        head = [{"role": "system", "content": system}] if system else []
        return {"model": model, "messages": [*head, *messages], **parameters}
    systems = [system] if system else []
    systems += [_words(turn["content"]) for turn in messages if turn["role"] == "system"]
    turns = [
        {"role": turn["role"], "content": _anthropic_content(turn["content"])}
        for turn in messages
        if turn["role"] != "system"
    ]
    body = {"model": model, "messages": turns, **parameters}
    if "stop" in body:
        stop = body.pop("stop")
        body["stop_sequences"] = [stop] if isinstance(stop, str) else stop
    return body | ({"system": "\n\n".join(systems)} if systems else {})


def _words(content: str | Sequence[Mapping]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _anthropic_content(content: str | Sequence[Mapping]) -> str | list[dict]:
    return content if isinstance(content, str) else [_anthropic_part(part) for part in content]


def _anthropic_part(part: Mapping) -> dict:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] != "image_url":
        raise EndpointError(f"a message holds a part of type {part['type']!r}; text and image_url can be sent")
    url = part["image_url"]["url"]
    inline = re.fullmatch(r"data:([\w/+.-]+);base64,(.*)", url, flags=re.DOTALL)
    if inline is None:
        return {"type": "image", "source": {"type": "url", "url": url}}
    return {"type": "image", "source": {"type": "base64", "media_type": inline[1], "data": inline[2]}}


def _read_openai(answer: Mapping) -> tuple[str, str | None, dict[str, int], str | None]:
    try:
        choice = answer["choices"][0]
        content = choice["message"].get("content")
        text = "".join(part.get("text") or "" for part in content) if isinstance(content, list) else content or ""
        usage = _read_usage(answer)
        tokens = {"input_tokens": usage.get("prompt_tokens"), "output_tokens": usage.get("completion_tokens")}
        return str(text), _read_word(choice.get("finish_reason")), _counted(tokens), _read_word(answer.get("model"))
    except (KeyError, IndexError, TypeError, AttributeError):
        raise _Unavailable("status 200, but the JSON holds no choices[0].message", status=200) from None


def _read_anthropic(answer: Mapping) -> tuple[str, str | None, dict[str, int], str | None]:
    try:
        text = "".join(block["text"] for block in answer["content"] if block["type"] == "text")
    except (KeyError, TypeError):
        raise _Unavailable("status 200, but the JSON holds no content", status=200) from None
    reason, usage = _read_word(answer.get("stop_reason")), _read_usage(answer)
    tokens = _counted({"input_tokens": usage.get("input_tokens"), "output_tokens": usage.get("output_tokens")})
    if "input_tokens" in tokens:  # its API counts what it caches beside these
        cached = _counted(
            {name: usage.get(name) for name in ("cache_creation_input_tokens", "cache_read_input_tokens")}
        )
        tokens["input_tokens"] += sum(cached.values())
    return text, ANTHROPIC_FINISH.get(reason, reason), tokens, _read_word(answer.get("model"))


_READERS = {"openai": _read_openai, "anthropic": _read_anthropic}


def _read_word(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _read_usage(answer: Mapping) -> Mapping:
    usage = answer.get("usage")
    return usage if isinstance(usage, dict) else {}


def _counted(tokens: Mapping[str, object]) -> dict[str, int]:
    """Those that are counts: whole numbers, not below 0, and neither True nor False, which Python takes for 1 and 0."""
    return {name: count for name, count in tokens.items() if type(count) is int and count >= 0}


def _clean_url(url: str, api: Api) -> str:
    """The base URL without the endpoint's path; URLs with anything secret in them are refused, unquoted."""
    try:
        parsed = httpx2.URL(url.strip())
    except httpx2.InvalidURL:
        parsed = httpx2.URL("")
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise EndpointError(
            "the endpoint's URL holds a user, a password or a query, which would end up in files; "
            "give the bare URL, and the key through an environment variable"
        )
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise EndpointError(f"{url!r} is not the URL of an endpoint; expected one such as http://localhost:8000/v1")
    clean = str(parsed).rstrip("/").removesuffix(PATHS[api])
    return clean if parsed.path.strip("/") else f"{clean}/v1"


def _open_client(api: Api, key: str | None, timeout: float) -> httpx2.Client:
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise EndpointError("the key of the endpoint holds blanks or other characters that a header cannot carry")
    headers = {"anthropic-version": ANTHROPIC_VERSION} if api == "anthropic" else {}
    if key:
        headers |= {"x-api-key": key} if api == "anthropic" else {"authorization": f"Bearer {key}"}
    direct = {f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")}  # never through a proxy
    limits = httpx2.Limits(max_connections=None)
    return httpx2.Client(headers=headers, timeout=timeout, mounts=direct, limits=limits, verify=_certificates())


@cache
def _certificates() -> ssl.SSLContext:
    """Who is trusted, read once: it takes longer than all else in opening a client."""
    return httpx2.create_ssl_context()


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait, of a header that gives them or a date."""
    if value is None:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", value.strip()):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def _error_fields(body: object) -> tuple[str, object]:
    """Message and parameter of an error's body: OpenAI's, Anthropic's, vLLM's, Google's and FastAPI's forms, or all."""
    if isinstance(body, list) and body:  # Google's
        body = body[0]
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return str(error), None
    message = error.get("message") or error.get("detail") or error
    if isinstance(message, list):  # FastAPI's: `loc` names the field; `input` would quote the whole request
        message = [(fault.get("loc"), fault.get("msg")) if isinstance(fault, dict) else fault for fault in message]
    return str(message), error.get("param")


def _error_text(body: object) -> str:
    """The server's own words, on one line and not at length."""
    return " ".join(_error_fields(body)[0].split())[:300] or "no reason given"


def _refused_parameter(body: object, parameters: Mapping[str, object], *, api: Api) -> str | None:
    """The parameter of ours that an error names as one, if leaving it out does not change what is asked.

    A name that merely stands in the message is none: the message may quote the question.
    """
    message, named = _error_fields(body)
    for name in DROPPABLE:
        if name in parameters and (named == name or (not named and _is_named(name, message))):
            return name
    # Anthropic's wants a limit. A limit that is too large ('max_tokens' or 'max_completion_tokens' …) stays what it is.
    renamed = api == "openai" and re.search(r"\buse ['\"`]?max_completion_tokens\b", message, re.IGNORECASE)
    return "max_tokens" if "max_tokens" in parameters and renamed else None


def _is_named(name: str, message: str) -> bool:
    """Whether a message names a parameter as servers do: 'seed', `seed`, "seed: Extra inputs …", "argument …: seed"."""
    return bool(
        re.search(rf"(['\"`]){name}\1", message)
        or re.search(rf"^{name}: Extra inputs are not permitted", message)
        or re.search(rf"\b(?:argument|parameter)s? [\w ]*: (?:\w+, )*{name}\b", message)
    )
