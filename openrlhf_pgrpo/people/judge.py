"""A language model as judge of two answers, behind any server that speaks the OpenAI protocol.

Each pair is asked about in both orders, because such judges lean towards a place. A verdict that depends on the order
is a tie.
"""

import asyncio
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from openrlhf_pgrpo.models.messages import Text
from openrlhf_pgrpo.people.pool import shown

KEY = "OPENAI_API_KEY"  # environment variable with the server's key
TRIES = 4
REQUESTS = 16  # pairs that are asked about at once
VERDICTS = {"a": "A", "b": "B", "tie": "tie"}
OTHER_ORDER = {"A": "B", "B": "A", "tie": "tie"}
ANYBODY = "people in general"  # where rows have no preference group
PLACES = ("prompt", "a", "b", "pref_group")  # in the prompt of a judge
PROMPT = """You compare two answers to one prompt on behalf of these readers: {pref_group}

[Prompt]
{prompt}
[End of the prompt]

[Answer A]
{a}
[End of answer A]

[Answer B]
{b}
[End of answer B]

Which answer would these readers prefer? Judge by what they want and not by your own taste. Length is no merit in
itself, and the order of the answers means nothing. Give your reasons in a few sentences. Then write your verdict on a
last line of its own, which is nothing but A, B or tie.
"""


class Pair(NamedTuple):
    """Two answers to a prompt, and in words for whom they are compared."""

    prompt: Text
    a: str
    b: str
    readers: str


def read_prompt(path: Path | None) -> str:
    """The prompt of a judge from a file, or the default.

    Raises:
        ValueError: a place is missing that it needs.
        OSError: it cannot be read.
    """
    if path is None:
        return PROMPT
    text = Path(path).read_text(encoding="utf-8")
    if missing := [f"{{{place}}}" for place in PLACES[:3] if f"{{{place}}}" not in text]:
        raise ValueError(f"--judge_prompt needs {{prompt}}, {{a}} and {{b}}, got {path} without {missing[0]}: add it")
    return text


def fill(text: str, pair: Pair) -> str:
    """The judge's prompt for a pair. What looks like a place inside an answer stays as it is."""
    values = dict(zip(PLACES, (shown(pair.prompt), pair.a, pair.b, pair.readers)))
    return re.sub(rf"\{{({'|'.join(PLACES)})\}}", lambda place: values[place[1]], text)


def verdict_in(said: str | None) -> str | None:
    """The verdict on the last line of a judge's answer: A, B or tie, and nothing else; None if there is none."""
    lines = (said or "").strip().splitlines()
    return VERDICTS.get(lines[-1].strip().lower()) if lines else None


class Judge:
    """Asks a server for verdicts.

    Args:
        url: with or without its /v1. name: of the model; None until `find_name`. timeout: seconds for an answer,
            before it is asked for again.

    Raises:
        ValueError: no address of a server, or numbers that cannot be.
    """

    def __init__(self, url: str, name: str | None, prompt: str, max_tokens: int, timeout: float):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ValueError(f"--judge needs an address like http://host:8000, got {url.split('@')[-1]!r}: correct it")
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        if max_tokens < 1:
            raise ValueError(f"--judge_tokens needs at least 1, got {max_tokens}: correct it")
        if not 0 < timeout < math.inf:
            raise ValueError(f"--judge_timeout needs seconds above 0, got {timeout}: correct it")
        self.name, self.prompt, self.max_tokens, self.timeout = name, prompt, max_tokens, timeout

    def find_name(self, before: str | None) -> str:
        """The name of the model: the given one, else that of `before`, else the first that the server has.

        Raises:
            ValueError: the server does not answer.
        """
        self.name = self.name or before or asyncio.run(self._first_model())
        return self.name

    def verdicts(self, pairs: Iterable[tuple[Any, Pair]], take: Callable[[Any, dict], None]) -> None:
        """Calls `take` with what comes with each pair, and its verdict: `verdict` (A, B, tie, or None for no verdict),
        `order_dependent`, and `said`, the judge's answers to both orders, or why there is none.

        Raises:
            ValueError: the server does not answer, or refuses to.
        """
        asyncio.run(self._verdicts(pairs, take))

    async def _verdicts(self, pairs, take) -> None:
        limit = asyncio.Semaphore(REQUESTS)
        async with self._client() as client:

            async def judge(what, pair: Pair) -> None:
                async with limit:
                    take(what, await self._verdict(client, pair))

            try:
                async with asyncio.TaskGroup() as tasks:  # the first that fails ends the others
                    for what, pair in pairs:
                        tasks.create_task(judge(what, pair))
            except ExceptionGroup as group:
                raise group.exceptions[0] from None

    async def _verdict(self, client, pair: Pair) -> dict:
        if pair.a == pair.b:
            return {"verdict": "tie", "order_dependent": False, "said": []}
        said = [await self._ask(client, shown) for shown in (pair, pair._replace(a=pair.b, b=pair.a))]
        first, second = (verdict_in(answer) for answer in said)
        if first is None or second is None:
            return {"verdict": None, "order_dependent": False, "said": said}
        same = first == OTHER_ORDER[second]
        return {"verdict": first if same else "tie", "order_dependent": not same, "said": said}

    async def _ask(self, client, pair: Pair) -> str | None:
        import openai

        try:
            answer = await client.chat.completions.create(
                model=self.name,
                messages=[{"role": "user", "content": fill(self.prompt, pair)}],
                temperature=0,
                max_tokens=self.max_tokens,
            )
            return answer.choices[0].message.content
        except openai.APIStatusError as error:
            if error.status_code in (400, 413, 422):  # about this pair, such as one that is too long
                return f"no answer: {self._told(error)}"
            raise ValueError(self._refusal(error)) from error
        except openai.APIConnectionError as error:
            raise ValueError(self._refusal(error)) from error
        except (openai.APIResponseValidationError, ValueError, AttributeError, LookupError, TypeError) as error:
            return f"no answer: no chat completion, {type(error).__name__}"

    async def _first_model(self) -> str:
        import openai

        try:
            async with self._client() as client:
                return (await client.models.list()).data[0].id
        except openai.APIError as error:
            raise ValueError(self._refusal(error)) from error
        except (ValueError, AttributeError, LookupError, TypeError) as error:
            raise ValueError(
                f"the judge needs a list of models at {self.url}/models, got something else: say --judge_model"
            ) from error

    def _client(self):
        from openai import AsyncOpenAI

        key = os.environ.get(KEY) or "none"  # a server of one's own asks for none
        return AsyncOpenAI(base_url=self.url, api_key=key, timeout=self.timeout, max_retries=TRIES - 1)

    def _refusal(self, error: Exception) -> str:
        return (
            f"the judge needs to answer at {self.url} within {self.timeout:g} seconds, got {self._told(error)}, after "
            f"up to {TRIES} tries: start it, or correct --judge, --judge_model or {KEY}"
        )

    def _told(self, error: Exception) -> str:
        """The message of an error, without the key, which some servers repeat."""
        key, told = os.environ.get(KEY), str(error)
        return f"{type(error).__name__}, {(told.replace(key, '***') if key else told)[:300]}"
