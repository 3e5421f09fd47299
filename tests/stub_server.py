"""A model's endpoint on loopback that does as it is told: OpenAI's and Anthropic's forms, and everything that can fail.

with StubServer(["429", "text"]) as server:   # the first request is sent away, all later ones are answered
    Endpoint(server.url, "stub", backoff=0.01).complete([{"role": "user", "content": "Hello"}])
assert len(server.requests) == 2
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# What a request can meet, by name; the last one of a script is for all that come later.
#   text          200 with `answer`                  empty         200 with an empty text
#   429, 500, 503, 529, 401, 404, 400                that status   429:2, 503:1   the same, with Retry-After
#   slow          200, after `delay` seconds         dripping      200, a byte at a time over `delay` seconds
#   truncated     a body shorter than it says        broken_json   a whole body that is half a JSON document
#   insufficient_quota   429 that no waiting mends
#   dropped       the connection closes unanswered   no_choices    200 with JSON of another form
#   raw:STATUS:BODY   that status and body, to the letter
#   refuses:NAME  400 naming that parameter, whenever a request holds it; 200 otherwise
# Anything else is the text that is answered.


class StubServer:
    """Serves in a thread while the `with` lasts. `script` is a list of names, or a function of the request's body.

    `requests` are the bodies received, `headers` theirs; `answer` is a text or a function of the request's body.
    """

    def __init__(
        self,
        script: Sequence[str] | Callable[[dict], str] = ("text",),
        *,
        answer: str | Callable[[dict], str] = "An answer.\nVERDICT: CORRECT",
        delay: float = 1.0,
    ) -> None:
        self.script = script
        self.answer = answer
        self.delay = delay
        self.requests: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.at_once = 0
        self.most_at_once = 0
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or head and body of an answer come 40 ms apart

            def do_POST(self) -> None:
                stub.serve(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 64

            def handle_error(self, *_: object) -> None:
                pass  # a client that is killed, or closes while it waits

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> StubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self._lock:
            number = len(self.requests)
            self.requests.append(body)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self.paths.append(handler.path)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        act = self.script(body) if callable(self.script) else self.script[min(number, len(self.script) - 1)]
        try:
            self.play(act, handler, body)
        finally:
            with self._lock:
                self.at_once -= 1

    def play(self, act: str, handler: BaseHTTPRequestHandler, body: dict) -> None:
        name, _, detail = act.partition(":")
        whole = json.dumps(write_answer(handler.path, body, self.text(body))).encode()
        if act == "slow":
            time.sleep(self.delay)
            send(handler, 200, whole)
        elif act == "dripping":
            send(handler, 200, b"", length=len(whole))
            for byte in whole:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
                time.sleep(self.delay / len(whole))
        elif act == "truncated":
            send(handler, 200, whole[: len(whole) // 2], length=len(whole))
            handler.close_connection = True
        elif act == "broken_json":
            send(handler, 200, whole[: len(whole) // 2])
        elif act == "dropped":
            handler.close_connection = True
        elif act == "no_choices":
            send(handler, 200, b'{"object": "something else"}')
        elif name == "raw":
            status, _, raw = detail.partition(":")
            send(handler, int(status), raw.encode())
        elif name == "refuses" and detail in body:
            message = f"Unsupported parameter: '{detail}' is not supported with this model."
            message += " Use 'max_completion_tokens' instead." * (detail == "max_tokens")
            send(handler, 400, error_body(message, detail))
        elif name.isdigit():
            extra = {"retry-after": detail} if detail else {}
            send(handler, int(name), error_body(f"made-up error {name}", None), extra=extra)
        elif act == "insufficient_quota":
            send(handler, 429, error_body("You exceeded your quota (insufficient_quota).", None))
        elif act == "text" or name == "refuses":
            send(handler, 200, whole)
        else:
            text = "" if act == "empty" else act
            send(handler, 200, json.dumps(write_answer(handler.path, body, text)).encode())

    def text(self, body: dict) -> str:
        return self.answer(body) if callable(self.answer) else self.answer


def send(
    handler: BaseHTTPRequestHandler, status: int, body: bytes, *, length: int | None = None, extra: dict | None = None
) -> None:
    handler.send_response(status)
    headers = {"content-type": "application/json", "content-length": str(len(body) if length is None else length)}
    for name, value in (headers | (extra or {})).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def error_body(message: str, parameter: str | None) -> bytes:
    return json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": parameter}}).encode()


def write_answer(path: str, body: dict, text: str) -> dict:
    """An answer as the two APIs document theirs; it counts a token for each word asked and answered."""
    asked, written = len(json.dumps(body["messages"]).split()), len(text.split())
    if path.endswith("/messages"):
        return {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": body["model"],
            "content": [{"type": "text", "text": text}] if text else [],
            "stop_reason": "end_turn",
            "usage": {"input_tokens": asked, "output_tokens": written},
        }
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": body["model"],
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written},
    }


def prompt_text(body: dict) -> str:
    """All the words of a request, whatever the API."""
    turns = [*([{"content": body["system"]}] if "system" in body else []), *body["messages"]]
    contents = [turn["content"] for turn in turns]
    return "\n".join(
        text if isinstance(text, str) else "\n".join(part["text"] for part in text if part["type"] == "text")
        for text in contents
    )
