"""What stands between the demo page's server and its visitors: what they may send, and what is remembered of them."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from urllib.parse import parse_qs

MAX_PICTURE = 30_000_000  # bytes of a file
MAX_BODY = 2 * MAX_PICTURE  # of a request: a picture in base64 takes a third more
UNHEARD = 60  # seconds until a question is dropped whose answer nobody listens to
TAKES_POST = ("/queue/join", "/cancel", "/reset", "/login")


class Guard:
    """Refuses what the page never sends: uploads and other ways to leave data on the server, and huge requests.

    It also lets Gradio forget a visitor as soon as the answer is delivered, or as nobody waits for it. The headers
    keep a browser from sending anything elsewhere.
    """

    HEADERS = (
        (b"content-security-policy", b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"),
        (b"referrer-policy", b"no-referrer"),
        (b"x-content-type-options", b"nosniff"),
    )

    def __init__(self, app) -> None:
        self.app = app
        self.heard: list[str] = []  # sessions, once for each connection that waits for their answers
        self.sweep: asyncio.Task | None = None

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = _refuse(scope)
        if status:
            await _answer(send, status)
            return
        passed = _Passed(receive, send, self.HEADERS)
        session = _find_session(scope)
        if session is not None:
            self.heard.append(session)
        try:
            await self.app(scope, passed.receive, passed.send)
        except Exception:
            if not passed.refused:  # else the app missed the rest of a body that it was not given
                raise
        finally:
            if session is not None:
                self.heard.remove(session)
                self._forget(scope["app"], session)
            if self.sweep is None or self.sweep.done():
                self.sweep = asyncio.create_task(self._sweep(scope["app"]))

    def _forget(self, app, session: str) -> None:
        """Drop what Gradio remembers of a visitor: the last picture, question and answer, for as long as it runs."""
        app.state_holder.session_data.pop(session, None)
        app.state_holder.time_last_used.pop(session, None)

    async def _sweep(self, app) -> None:
        """As long as anybody is remembered, drop those who asked and do not listen."""
        queue, holder = app.get_blocks()._queue, app.state_holder
        while holder.session_data:
            await asyncio.sleep(UNHEARD)
            before = datetime.now() - timedelta(seconds=UNHEARD)
            for session in list(holder.session_data):
                if session not in self.heard and holder.time_last_used[session] < before:
                    await queue.clean_events(session_hash=session)  # what waits for its turn
                    queue.pending_event_ids_session.pop(session, None)
                    queue.pending_messages_per_session.pop(session, None)
                    self._forget(app, session)


class _Passed:
    """A request on its way to the app: its headers are added, and a body is cut off where it grows too large."""

    def __init__(self, receive, send, headers) -> None:
        self._receive, self._send, self.headers = receive, send, headers
        self.size = 0
        self.refused = False

    async def receive(self):
        if self.refused:
            return {"type": "http.disconnect"}
        message = await self._receive()
        self.size += len(message.get("body", b""))
        if self.size <= MAX_BODY:
            return message
        self.refused = True  # nobody had to announce how long the body is, as behind some proxies
        await _answer(self._send, 413)
        return {"type": "http.disconnect"}

    async def send(self, message) -> None:
        if self.refused:
            return
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *self.headers]}
        await self._send(message)


async def _answer(send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"connection", b"close")]})
    await send({"type": "http.response.body", "body": b"This page takes no such request."})


def _find_session(scope) -> str | None:
    """The session of a request that waits for answers."""
    if not scope["path"].rstrip("/").endswith("/queue/data"):
        return None
    return parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]


def _refuse(scope) -> int | None:
    path = scope["path"].rstrip("/")
    if scope["method"] in ("GET", "HEAD", "OPTIONS"):
        # A "deep link" would write what is on the page to a file.
        return 403 if path.endswith("/deep_link") or "/monitoring" in path else None
    if not path.endswith(TAKES_POST):
        return 403
    length = dict(scope["headers"]).get(b"content-length", b"")
    return 413 if length.isdigit() and int(length) > MAX_BODY else None
