"""The questions on a local page: three requests to one `Session`, behind a token, for a browser on this machine."""

import asyncio
import ipaddress
import json
import secrets
import socket
from threading import Lock
from typing import Literal

import jinja2
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from openrlhf_pgrpo.people.connections import MOST_AT_ONCE, PATIENCE, Connection
from openrlhf_pgrpo.people.session import NotNow, Session

LARGEST_BODY = 4096  # bytes; an answer takes 70
LARGEST_HEAD = 16384
TOKEN = "X-Elicit-Token"


class Body(BaseModel):
    """The body of a posted answer; `question` is the name of the question that was shown."""

    model_config = ConfigDict(extra="forbid", strict=True)
    question: str
    choice: Literal["left", "tie", "right", "skip", "both bad"]


class AsciiJSON(JSONResponse):
    """JSON that can hold any text: a file's name may have bytes that are no UTF-8."""

    def render(self, content) -> bytes:
        return json.dumps(content, allow_nan=False).encode("ascii")


def listen(host: str, port: int) -> socket.socket:
    """A socket at one address of this machine. Port 0 means any free port.

    Raises:
        ValueError: the address stands for all addresses of this machine, since other machines could reach the page
            then; or it is none; or no port.
        OSError: the port is taken, or the address is not of this machine.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port needs a number from 0 to 65535, got {port}")
    name = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        if not name.strip():
            raise ValueError("no address at all")
        address = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0][4][0]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--host needs one address of this machine, got {host!r} ({error}): 127.0.0.1 is this machine alone"
        ) from error
    address = str(getattr(ipaddress.ip_address(address), "ipv4_mapped", None) or address)
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        bound = listener.getsockname()[0]
        ip = ipaddress.ip_address(bound)
        if ip.is_unspecified or ip.is_multicast or "%" in bound:  # with %, no browser opens it
            raise ValueError(
                f"--host needs one address of this machine, got {host!r}, which is {bound}: 127.0.0.1 is this machine "
                "alone"
            )
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


def serve(session: Session, listener: socket.socket) -> None:
    """Serves the page until interrupted, and prints its address, which holds the token."""
    token = secrets.token_urlsafe(16)
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    server = server_of(create_app(session, host, token))
    print(f"open http://{host}:{port}/?token={token}", flush=True)
    print("stop with Ctrl-C; every answer is kept, and the same command goes on from there", flush=True)
    server.run([listener])


def server_of(app: FastAPI) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_level="warning",
            backlog=MOST_AT_ONCE,
            proxy_headers=False,
            h11_max_incomplete_event_size=LARGEST_HEAD,
        )
    )


def create_app(session: Session, host: str, token: str) -> FastAPI:
    """The page and its three requests.

    Every request needs the token, so other pages and other people on the machine get nothing. Requests must be
    addressed to `host` (written as a browser does) or localhost, since a foreign page could make its own name point
    here.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[host, "localhost"], www_redirect=False)
    one_at_a_time = Lock()
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("openrlhf_pgrpo.people"), autoescape=True, undefined=jinja2.StrictUndefined
    )

    def check(given: str | None) -> None:
        if not secrets.compare_digest((given or "").encode(), token.encode()):
            raise HTTPException(403, "this page needs its token: open the address that the terminal shows")

    def check_header(request: Request) -> None:
        check(request.headers.get(TOKEN))

    async def change(action, *args) -> JSONResponse:
        """Calls `action` and replies with the state after it."""

        def act():
            with one_at_a_time:
                try:
                    action(*args)
                    return 200, view(session)
                except NotNow as error:
                    return 409, view(session) | {"detail": str(error)}
                except OSError as error:
                    return 500, view(session) | {"detail": f"not saved, so nothing was changed: {error}"}

        status, content = await run_in_threadpool(act)
        return AsciiJSON(content, status)

    @app.middleware("http")
    async def add_headers(request: Request, call_next):
        response = await call_next(request)
        response.headers["Cache-Control"] = "no-store"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    @app.get("/")
    def page(token: str = "") -> HTMLResponse:
        check(token)
        nonce = secrets.token_urlsafe(16)
        with one_at_a_time:
            state = view(session)
        html = environment.get_template("page.html").render(state=state, token=token, header=TOKEN, nonce=nonce)
        own = f"'nonce-{nonce}'"
        policy = f"default-src 'none'; script-src {own}; style-src {own}; connect-src 'self'; "
        policy += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        return HTMLResponse(html, headers={"Content-Security-Policy": policy})

    @app.get("/state", dependencies=[Depends(check_header)])
    async def state() -> JSONResponse:
        return await change(lambda: None)

    @app.post("/answer", dependencies=[Depends(check_header)])
    async def answer(request: Request) -> JSONResponse:
        try:
            body = Body.model_validate_json(await read_body(request))
        except ValidationError as error:
            detail = error.errors(include_url=False, include_input=False, include_context=False)
            raise HTTPException(422, detail) from error
        return await change(session.answer, body.question, body.choice)

    @app.post("/undo", dependencies=[Depends(check_header)])
    async def undo(request: Request) -> JSONResponse:
        await read_body(request)
        return await change(session.undo)

    return app


async def read_body(request: Request) -> bytes:
    """The body of a request; one that is larger or slower than anything the page sends is refused."""
    body = b""
    try:
        async with asyncio.timeout(PATIENCE):
            async for part in request.stream():
                body += part
                if len(body) > LARGEST_BODY:
                    raise HTTPException(413, f"a request needs at most {LARGEST_BODY} bytes")
    except TimeoutError as error:
        raise HTTPException(408, f"a request needs to arrive within {PATIENCE:g} seconds") from error
    except ClientDisconnect as error:
        raise HTTPException(400, "a request needs a whole body") from error  # nobody reads it
    return body


def view(session: Session) -> dict:
    """Everything that the page shows."""
    forecast = session.forecast()
    return {
        "user": session.profile.user,
        "answered": len(session.profile.answers),
        "skipped": len(session.profile.skipped),
        "questions": session.questions,
        "entropy": session.entropy,
        "level": session.level,
        "question": session.question and session.question._asdict(),
        "coefficients": [one._asdict() for one in session.coefficients()],
        "forecast": forecast and forecast._asdict(),
        "ranking": [
            {"prompt": prompt, "answers": [one._asdict() for one in ranked]}
            for prompt, ranked in ([] if session.question else session.ranking())
        ],
        "profile": str(session.path),
    }
