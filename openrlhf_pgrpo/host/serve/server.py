"""A factorized reward model over HTTP, in the protocol of the host's serve_rm. It runs in the server's process.

The host's script ignores the label of a query. Here the label says whose reward is asked for: it is the user, or an
object that holds the user under `--data.user_key`. In PPO the label is the column of `--data.label_key`.

Every other text of a request is somebody else's, so a request may be anything. It has limits of its size, it is scored
in batches that do not grow with it, and the server listens on this machine alone unless --host says otherwise. A
rollout sends single texts, many at a time: what has come while texts were scored is scored together next.
"""

import asyncio
import ipaddress
import logging
import re
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from openrlhf.cli.serve_rm import RewardModelProxy
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from openrlhf_pgrpo.core.names import listed, name_of
from openrlhf_pgrpo.files import json_object
from openrlhf_pgrpo.host.serve.flags import HostDefault
from openrlhf_pgrpo.host.serve.patience import Patience
from openrlhf_pgrpo.host.user_rewards import UserRewards
from openrlhf_pgrpo.models.folder import Folder
from openrlhf_pgrpo.models.form import Writer
from openrlhf_pgrpo.models.scoring import MOST_TEXTS, check, read
from openrlhf_pgrpo.models.texts import Texts, Tokens, TooLong, end_of_text

SLOWEST = 60.0  # seconds that a client may take to send a request
LONGEST_LINE = 16  # The requests that wait may have so many times the bytes of the largest one.
# How policies close an answer; a reward model with another tokenizer would read it as words.
OTHER_END = re.compile(r"(<\|[^<>|\s]+\|>|</s>|<eos>|<end_of_turn>)\n*\Z")
logger = logging.getLogger("uvicorn.error")


class Asked(NamedTuple):
    """What a request asks for: the rewards of texts (B,) for their users. `cut` (B,) says which were cut."""

    tokens: Tokens
    users: list[str | None]
    cut: np.ndarray


class Limits(NamedTuple):
    """The most that a request may hold: texts, characters of a text, bytes of its body."""

    texts: int
    characters: int
    body: int


def serve(args, folder: Folder) -> None:
    """Serves until it is stopped; nested arguments of the host's script.

    Raises:
        ValueError: a profile that does not fit, or another longest text than the model's.
        OSError: the port is taken, or the address is not of this machine.
    """
    asked = args.data.max_len
    if not isinstance(asked, HostDefault) and asked != folder.max_length:
        raise ValueError(
            f"--data.max_len needs to be {folder.max_length}, the longest text that {folder.name} was made for, got "
            f"{asked}: leave it out"
        )
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((args.host, args.port))  # before the model is loaded; nobody is kept waiting until it is
        limits = Limits(args.max_texts, args.max_characters, args.max_body)
        app = application(UserRewardProxy(args, folder, limits), limits)
        config = uvicorn.Config(app, http=PatientProtocol, ws="none", log_level="info")
        print(f"[pgrpo] serves {folder.name} at {_place(listener)}", flush=True)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn hands it on once it has answered those who wait: nothing is wrong
            sys.exit(128 + signal.SIGINT)


def _place(listener: socket.socket) -> str:
    """The address that the socket is bound to, and who can reach it."""
    address, port = listener.getsockname()[:2]
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    url = f"http://{f'[{address}]' if ':' in address else address}:{port}/get_reward"
    if ip.is_loopback:
        return f"{url}, for this machine alone: --host 0.0.0.0 opens it to other machines"
    return (
        f"{url}, {'on all interfaces, ' if ip.is_unspecified else ''}for everybody who reaches it: it has no password"
    )


class PatientProtocol(Patience, AutoHTTPProtocol):
    """uvicorn's HTTP, without the patience that it has for ever."""

    def seconds(self) -> float:
        return SLOWEST

    def end(self) -> None:
        self.transport.close()


class UserRewardProxy(RewardModelProxy):
    """The host's model behind its server, with users."""

    def __init__(self, args, folder: Folder, limits: Limits):
        self.users, self.user_key, self.limits = UserRewards(folder, args.reward), args.data.user_key, limits
        super().__init__(args)
        self.writer = Writer(folder.form, self.tokenizer)
        ends = [*self.writer.ends, *filter(None, [args.reward.end])]
        self.ends = (end_of_text(self.tokenizer), *ends)
        self.texts = Texts(self.tokenizer, folder.max_length, ends)

    def get_rewards(self, requests: Sequence[dict]) -> list[tuple[list[float], np.ndarray] | ValueError]:
        """For each request rewards (B,) and base rewards (B, D), or why it has none. All texts are read together."""
        found = [_error_of(self._ask, request) for request in requests]
        asked = [one for one in found if isinstance(one, Asked)]
        ids = [ids for one in asked for ids in one.tokens.ids]
        if ids:
            model = self.reward_model
            base_rewards = iter(read(model, model, self.texts, ids, self.batch_size or MOST_TEXTS))
        return [
            _error_of(self._rewards, one, np.array([*islice(base_rewards, len(one.users))]))
            if isinstance(one, Asked)
            else one
            for one in found
        ]

    def _ask(self, request: dict) -> Asked:
        """The texts and users of a request: `query` has whole texts, prompt and response, `labels` their users, and
        `prompts`, if it is there, the prompt in each query. Such a prompt is cut, its response never. If it is a list
        of messages, the query is the response alone.

        Raises:
            TooLong: more texts, a longer text or a longer response than fits.
            ValueError: the request does not say whose rewards it asks for, or has a text of another form.
        """
        queries, labels, prompts = (request.get(name) for name in ("query", "labels", "prompts"))
        queries = _list_of_texts("query", queries, self.limits)
        chats = [isinstance(prompt, list) for prompt in prompts] if isinstance(prompts, list) else []
        if any(chats):
            prompts = [self.writer.prompt(prompt) if chat else prompt for prompt, chat in zip(prompts, chats)]
        prompts = [None] * len(queries) if prompts is None else _list_of_texts("prompts", prompts, self.limits)
        labels = [None] * len(queries) if labels is None else labels
        if not isinstance(labels, list) or not len(queries) == len(labels) == len(prompts):
            raise ValueError(
                "a request needs a list `query` of texts, and an equally long list `labels` of their users, got "
                f"{_kind_of(queries)} and {_kind_of(labels)}"
                + (f", and {_kind_of(prompts)} of prompts" if len(prompts) != len(queries) else "")
            )
        if any(chats):
            whole = [
                prompt + self.writer.begun(query) if chat else query
                for query, prompt, chat in zip(queries, prompts, chats)
            ]
            queries = _list_of_texts("query", whole, self.limits)
        self._check_form(queries)
        users = [self._user(number, label) for number, label in enumerate(labels)]
        known = np.array([prompt is not None and query.startswith(prompt) for query, prompt in zip(queries, prompts)])
        before = [prompt if is_known else "" for prompt, is_known in zip(prompts, known)]
        tokens = self.texts.tokens(before, [query[len(prompt) :] for query, prompt in zip(queries, before)])
        # A text whose prompt is not known is cut as if all of it were prompt.
        cut, tokens = tokens.cut | tokens.too_long, tokens._replace(too_long=tokens.too_long & known)
        check(self.reward_model, self.texts, tokens)
        return Asked(tokens, users, cut)

    def _rewards(self, asked: Asked, base_rewards: np.ndarray) -> tuple[list[float], np.ndarray]:
        """Rewards (B,) and base rewards (B, D).

        Raises:
            ValueError: a user is unknown, or a number is not finite.
        """
        if asked.cut.any():
            logger.warning(
                f"{asked.cut.sum()} of {len(asked.cut)} texts were cut from the left to {self.texts.max_length} tokens"
            )
        if not np.isfinite(base_rewards).all():
            number = int(np.isfinite(base_rewards).all(1).argmin())
            raise ValueError(
                f"every reward needs to be finite, got nan or inf for text {number}: look for other numbers with "
                "another --ds.param_dtype, or train the model again"
            )
        return self.users(base_rewards, asked.users).tolist(), base_rewards

    def _check_form(self, queries: list[str]) -> None:
        """Raises ValueError for a text that is certainly not written as those of the model."""
        opening = self.writer.opening.strip()
        for number, query in enumerate(queries):
            if opening not in query:
                raise ValueError(
                    f"this model's texts are written {self.writer.form} and need {self.writer.opening!r} before the "
                    f"answer, got none in text {number}: let the policy be prompted so, for instance with "
                    "--data.apply_chat_template, or send `prompts` as lists of messages"
                )
            end = OTHER_END.search(query)
            if end and not query.rstrip("\n").endswith(self.ends):
                raise ValueError(
                    f"a text needs to end with its last word, or with {listed(self.ends)}, got "
                    f"{end[1]!r} in text {number}: start the server with --reward.end '{end[1]}'"
                )

    def _user(self, number: int, label: Any) -> str | None:
        """The user that a label names; None if it names nobody."""
        user = label.get(self.user_key) if isinstance(label, dict) else label
        try:
            return None if user is None else name_of(user)
        except ValueError as error:
            raise ValueError(f"every label needs to name a user, got {error} in label {number}") from error


class Waiting(NamedTuple):
    """A request in line: its body, and its reply to come."""

    request: Request
    body: bytes
    reply: asyncio.Future[Response]


def application(proxy: UserRewardProxy, limits: Limits) -> FastAPI:
    """The one request of the host's protocol. While texts are scored, others wait in line and are still heard. Then
    the first in line has everything scored that fits into one request."""
    app, line, one_at_a_time = FastAPI(docs_url=None, redoc_url=None, openapi_url=None), deque(), asyncio.Lock()

    @app.post("/get_reward")
    async def get_reward(request: Request) -> Response:
        try:
            async with asyncio.timeout(SLOWEST):
                body = await _body(request, limits.body)
        except TimeoutError:
            return _refusal(408, f"a request needs to arrive within {SLOWEST:.0f} seconds: send it faster, or less")
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except TooLong as error:
            return _refusal(413, error)
        if sum(len(other.body) for other in line) > LONGEST_LINE * limits.body:
            return _refusal(503, "the line needs to be short, got too many requests at once: try again, or send fewer")
        waiting = Waiting(request, body, asyncio.get_running_loop().create_future())
        line.append(waiting)
        async with one_at_a_time:
            if not waiting.reply.done():
                await _serve_first(line, proxy, limits.body)
        return await waiting.reply

    return app


async def _serve_first(line: deque[Waiting], proxy: UserRewardProxy, most: int) -> None:
    """Replies to the first requests in line, as many as have `most` bytes together."""
    some, size = [], 0
    while line and (not some or size + len(line[0].body) <= most):
        some.append(line.popleft())
        size += len(some[-1].body)
    try:
        gone = [waiting for waiting in some if await waiting.request.is_disconnected()]  # nobody reads their replies
        here = [waiting for waiting in some if waiting not in gone]
        replies = await run_in_threadpool(_replies, proxy, [waiting.body for waiting in here])
    except BaseException as error:  # whatever it is, nobody is left to wait for ever
        for waiting in some:
            waiting.reply.set_exception(error)
        raise
    for waiting, reply in zip([*gone, *here], [Response(status_code=400)] * len(gone) + replies):
        waiting.reply.set_result(reply)


async def _body(request: Request, most: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > most:
            raise TooLong(f"a request may have {most} bytes, got more: send fewer texts at once, or raise --max_body")
    return b"".join(parts)


def _replies(proxy: UserRewardProxy, bodies: Sequence[bytes]) -> list[Response]:
    requests = [_error_of(json_object, body, "a request") for body in bodies]
    found = iter(proxy.get_rewards([request for request in requests if isinstance(request, dict)]))
    return [_reply(next(found) if isinstance(request, dict) else request) for request in requests]


def _reply(found: tuple[list[float], np.ndarray] | ValueError) -> Response:
    if isinstance(found, ValueError):
        return _refusal(413 if isinstance(found, TooLong) else 422, found)
    rewards, base_rewards = found
    # One number of each kind for a text: lists among the logs of a sample crash the host's actor.
    logs = {f"base_reward_{number}": column.tolist() for number, column in enumerate(base_rewards.T)}
    return JSONResponse({"rewards": rewards, "scores": rewards, "extra_logs": logs})


def _error_of(function: Callable, *args) -> Any:
    """What the function returns, or the ValueError that it raises: of requests that are scored together, one may be
    refused."""
    try:
        return function(*args)
    except ValueError as error:
        return error


def _refusal(status: int, reason: object) -> JSONResponse:
    """The sentence for the client. It goes to the log as well, because the host's clients show the status alone."""
    text = str(reason).encode("utf-8", "backslashreplace").decode()
    logger.warning(f"refused with {status}: {text}")
    return JSONResponse({"detail": text}, status)


def _list_of_texts(name: str, values: Any, limits: Limits) -> list[str]:
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"a request needs a list `{name}` of texts, got {_kind_of(values)}")
    if len(values) > limits.texts:
        raise TooLong(
            f"a request may have {limits.texts} texts, got {len(values)}: send fewer at once, or raise --max_texts"
        )
    if (longest := max(map(len, values))) > limits.characters:
        raise TooLong(
            f"a text may have {limits.characters} characters, got {longest} in text "
            f"{[len(value) for value in values].index(longest)}: shorten it, or raise --max_characters"
        )
    return values


def _kind_of(values: Any) -> str:
    return f"a list of {len(values)}" if isinstance(values, list) else type(values).__name__
