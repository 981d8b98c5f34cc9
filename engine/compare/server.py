"""The local web server: loopback only, for the holder of the address alone."""

import asyncio
import json
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import parse_qs, urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.requests import ClientDisconnect, Request, cookie_parser
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.compare.page import page_of
from engine.compare.session import Refused, Session
from engine.pages.templates import render
from utils import UserError

HOST = "127.0.0.1"
HOSTS = {HOST, "localhost", "::1"}
MAX_FORM_BYTES = 1_000_000
SECONDS_BETWEEN_PIECES = 0.05
SCRIPT = Path(__file__).with_name("compare.js")
TEMPLATE = Path(__file__).with_name("compare.html.jinja")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers send no Origin
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


# ---- Who may ask ----


class Guard:
    """Lets requests through that this page sent, from a browser with the token.

    - Host: a loopback name, so a foreign name that resolves to 127.0.0.1 is refused.
    - Token: once in the address, then in a cookie.
    - Origin of a POST: this page, so other pages cannot send forms.

    Args:
        app: the application behind it.
        token: the secret in the address.
        cookie: its name; each port has its own, as cookies are shared by ports.
    """

    def __init__(self, app: ASGIApp, token: str, cookie: str):
        self._app, self._token, self._cookie = app, token, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        answer = self._refusal(scope) or self._app
        await answer(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        """The answer to a request that goes no further; None for one that does."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if host_name(host) not in HOSTS:
            return PlainTextResponse("refused: the name of the host is not this machine's\n", 400)
        if scope["method"] not in ("GET", "HEAD") and headers.get("origin") != f"http://{host}":
            return PlainTextResponse("refused: the form is of another page\n", 403)
        if scope["path"] == "/" and self._is_token(QueryParams(scope["query_string"]).get("token", "")):
            answer = RedirectResponse("/", 303)
            # Lax: a link from another page may open this one. Forms of other pages are refused above.
            answer.set_cookie(self._cookie, self._token, httponly=True, samesite="lax")
            return answer
        if not self._is_token(cookie_parser(headers.get("cookie", "")).get(self._cookie, "")):
            return PlainTextResponse("refused: open the address that compare.py printed, with its token\n", 403)
        return None

    def _is_token(self, text: str) -> bool:
        return secrets.compare_digest(text.encode(), self._token.encode())


def host_name(host: str) -> str:
    """The name in a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


# ---- Pages ----


def make_app(session: Session, token: str, cookie: str = "compare") -> Guard:
    """The application: pages, forms and a stream of the text."""

    def show(problem: str = "", status: int = 200) -> HTMLResponse:
        html = render(TEMPLATE, page=page_of(session), problem=problem)
        return HTMLResponse(html.encode("utf-8", "backslashreplace"), status)

    async def index(request: Request) -> Response:
        return show()

    async def script(request: Request) -> Response:
        return Response(SCRIPT.read_bytes(), media_type="text/javascript")

    async def stream(request: Request) -> Response:
        events = stream_events(session, request.query_params.get("round", ""))
        return StreamingResponse(events, media_type="text/event-stream")

    def form(action: Callable[[dict[str, str]], None]) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint that acts on a form, and shows the page again."""

        async def answer(request: Request) -> Response:
            try:
                values = await read_form(request)
            except (ValueError, ClientDisconnect):
                return show("The text is too long.", 413)
            try:
                await run_in_threadpool(action, values)
            except Refused as error:
                return show(str(error), 409)
            except UserError as error:
                return show(str(error), 507)
            return RedirectResponse("/", 303)

        return answer

    actions: dict[str, Callable[[dict[str, str]], None]] = {
        "/ask": lambda values: ask(session, values),
        "/stop": lambda values: session.stop(),
        "/vote": lambda values: session.vote(values.get("round", ""), values.get("choice", "")),
        "/skip": lambda values: session.skip(values.get("round", "")),
        "/reset": lambda values: session.reset(),
    }
    routes = [Route("/", index), Route("/compare.js", script), Route("/events", stream)]
    routes += [Route(path, form(action), methods=["POST"]) for path, action in actions.items()]
    return Guard(Starlette(routes=routes), token, cookie)


def ask(session: Session, values: dict[str, str]) -> None:
    if "number" in values:
        number = values["number"]
        session.ask_prompt(int(number) if number.isdecimal() and len(number) < 10 else -1)
    else:
        session.ask(values.get("prompt", "").replace("\r\n", "\n"))


async def read_form(request: Request) -> dict[str, str]:
    """The fields of a form.

    Raises:
        ValueError: if it is too long.
    """
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_FORM_BYTES:
            raise ValueError("too long")
    fields = parse_qs(data.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=20, errors="replace")
    return {name: values[0] for name, values in fields.items()}


async def stream_events(session: Session, round_id: str) -> AsyncIterator[str]:
    """Send the texts of a round while they grow, then the event done."""
    sent: list[str] | None = None
    while not session.is_closed:
        current = session.round
        if current is None or current.id != round_id:
            break
        is_over = current.state != "running"  # before the texts are read
        if current.texts != sent:
            sent = list(current.texts)
            yield f"data: {json.dumps({'texts': sent})}\n\n"
        if is_over:
            break
        await asyncio.sleep(SECONDS_BETWEEN_PIECES)
    yield "event: done\ndata: {}\n\n"


# ---- The server ----


def listen(port: int) -> socket.socket:
    """A socket on the loopback interface; port 0 takes a free one.

    Raises:
        UserError: CONFIG, if the port is taken.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        problem = f"port: {port} cannot be used ({error.strerror})"
        raise UserError("CONFIG", problem, "give another one; port=0 takes a free one") from error
    return listener


def serve(session: Session, listener: socket.socket) -> None:
    """Print the address, and serve until a signal.

    Raises:
        KeyboardInterrupt: after Ctrl-C.
    """

    received: list[int] = []

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            session.is_closed = True  # streams end, so connections can be closed
            received.append(sig)
            super().handle_exit(sig, frame)

    port = listener.getsockname()[1]
    token = secrets.token_urlsafe(24)
    settings: dict[str, Any] = {
        "lifespan": "off",
        "ws": "none",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "timeout_graceful_shutdown": 2,
    }
    server = Server(uvicorn.Config(make_app(session, token, f"compare-{port}"), **settings))
    listener.listen()  # so the address works once it is printed
    print(f"compare: http://{HOST}:{port}/?token={token} (Ctrl-C ends it)", flush=True)
    server.run(sockets=[listener])
    if signal.SIGINT in received:  # uvicorn raises it again, but a shell's background jobs ignore it
        raise KeyboardInterrupt
