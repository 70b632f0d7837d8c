# SPDX-License-Identifier: Apache-2.0
"""``judge``: a reward part that asks a language model over HTTP, by the chat completions of OpenAI's API.

    env:
      reward_weights: {judge: 0.3}
      reward_options:
        judge: {addresses: ["http://host:8000/v1"], model: Qwen/Qwen3-32B, cache: runs/verdicts.sqlite}

Responses are judged side by side. A request that fails, or whose reply has no verdict, is repeated after a pause, at
the next address; a response that no repetition gave a verdict has no reward. Replies are kept by the content of the
request, so that no question is asked twice, also not by a run that goes on or by another one.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, MinLen

from megatron_g2rpo.tasks.reward_parts import register
from megatron_g2rpo.types import Response, Sample

PROMPT = """Judge an answer to a question by the reference answer.

Question: {question}

Reference answer: {reference}

Answer: {answer}

Is the answer right? Say in one or two sentences what speaks for it and against it. Then end with a line "Score: N", N \
from 0 (wrong) to 10 (as right as the reference)."""
# Pauses before repetitions: this, and twice as long each time, seconds.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
# Seconds to wait for the lock of the cache, which all replicas of a run write.
CACHE_LOCK_S = 60.0

_PLACE = re.compile(r"\{(question|reference|answer|response)\}")


class NoVerdict(RuntimeError):
    """The judge gave no verdict on a response; the message says why."""


@register("judge", batched=True)
def judge(
    samples: Sequence[Sample],
    responses: Sequence[Response],
    *,
    addresses: Annotated[list[str], MinLen(1)],
    model: str,
    prompt: str = PROMPT,
    verdict: str = r"Score:\s*\**\s*(\d+(?:\.\d+)?)",
    lowest: float = 0.0,
    highest: float = 10.0,
    images: bool = False,
    max_tokens: Annotated[int, Gt(0)] = 512,
    temperature: Annotated[float, Ge(0.0)] = 0.0,
    concurrency: Annotated[int, Gt(0)] = 32,
    retries: Annotated[int, Ge(0)] = 4,
    timeout_s: Annotated[float, Gt(0.0)] = 120.0,
    api_key_env: str | None = None,
    cache: str | None = None,
) -> list[float | Exception]:
    """Return what a judge model says of each response, scaled to [0, 1], or why it said nothing.

    A response without an answer is worth 0 and not asked about, unless the prompt shows the whole response.

    Args:
        samples: the samples.
        responses: a response to each.
        addresses: base URLs of servers with the same model, ``http://HOST:PORT/v1``; requests are dealt out to them.
        model: name of the model on the servers.
        prompt: text of the request, in which ``{question}``, ``{reference}``, ``{answer}`` and ``{response}`` (its
            whole text) are replaced.
        verdict: regular expression whose last match in the reply has the verdict, a number, as its first group.
        lowest: verdict that is worth 0.
        highest: verdict that is worth 1.
        images: whether the images of the sample are sent, before the text.
        max_tokens: largest number of tokens of a reply.
        temperature: temperature at which the judge samples.
        concurrency: number of requests under way at once.
        retries: number of repetitions of a request that failed, or whose reply has no verdict.
        timeout_s: seconds that one request may take.
        api_key_env: name of the environment variable that holds the servers' API key; None: they need none.
        cache: SQLite file that keeps replies by the content of the request; None: nothing is kept.

    Raises:
        ValueError: the environment variable is not set, or the bounds are in the wrong order.
    """
    if not lowest < highest:
        raise ValueError(f"env.reward_options.judge: lowest ({lowest:g}) is not below highest ({highest:g})")
    pattern = re.compile(verdict)

    def value(reply: str) -> float:
        found = pattern.findall(reply)
        if not found:
            raise NoVerdict(f"the reply has no verdict ({verdict}): {reply[-200:]!r}")
        number = float(found[-1] if isinstance(found[-1], str) else found[-1][0])
        if not lowest <= number <= highest:
            raise NoVerdict(f"the verdict {number:g} is not between {lowest:g} and {highest:g}")
        return (number - lowest) / (highest - lowest)

    def body(sample: Sample, response: Response) -> dict[str, Any]:
        content = [*(_image_part(image) for image in sample.images)] if images else []
        text = {"type": "text", "text": _filled(prompt, sample, response)}
        message = {"role": "user", "content": [*content, text] if content else text["text"]}
        return {"model": model, "messages": [message], "max_tokens": max_tokens, "temperature": temperature}

    whole = "{response}" in prompt
    asked = {
        row: body(sample, response)
        for row, (sample, response) in enumerate(zip(samples, responses, strict=True))
        if whole or response.answer is not None
    }
    keys = {row: _key(request) for row, request in asked.items()}
    servers = _Servers(addresses, _headers(api_key_env), timeout_s=timeout_s, retries=retries, patience=concurrency)
    with _Replies.opened(cache) as known, servers:
        values: dict[str, float | Exception] = {}
        for key in set(keys.values()):
            reply = known.get(key)
            if reply is not None:
                values[key] = _outcome(value, reply)
        missing = {key: asked[row] for row, key in keys.items() if key not in values}
        with ThreadPoolExecutor(max_workers=concurrency) as threads:
            pending = {
                threads.submit(servers.verdict, request, value, number): key
                for number, (key, request) in enumerate(missing.items())
            }
            for future in as_completed(pending):
                error = future.exception()
                if isinstance(error, NoVerdict):
                    values[pending[future]] = error
                    continue
                reply, values[pending[future]] = future.result()
                known.put(pending[future], reply)
    return [values[keys[row]] if row in keys else 0.0 for row in range(len(samples))]


class _Servers:
    """Servers that judge, and what is known of them during one call of the part.

    Args:
        addresses: base URLs.
        headers: headers of every request.
        timeout_s: seconds that one request may take.
        retries: number of repetitions of a request.
        patience: number of requests that may fail for good, before any was answered, until the others are not sent.
    """

    def __init__(
        self, addresses: Sequence[str], headers: Mapping[str, str], *, timeout_s: float, retries: int, patience: int
    ) -> None:
        # Not at the top: every start of every recipe would pay for it.
        import httpx2

        self._errors = (httpx2.HTTPError, httpx2.InvalidURL)
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx2.Client(headers=dict(headers), timeout=timeout_s, limits=limits)
        self._addresses, self._retries = [address.rstrip("/") for address in addresses], retries
        self._patience, self._answered = patience, False
        self._given_up: list[str] = []

    def __enter__(self) -> _Servers:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def verdict(self, body: dict[str, Any], value: Callable[[str], float], number: int) -> tuple[str, float]:
        """Return the reply to a request, and its verdict.

        Args:
            body: the request.
            value: function from a reply to the verdict, which raises ``NoVerdict``.
            number: number of the request, which says whom it is sent to first.

        Raises:
            NoVerdict: no repetition had one, or the servers have failed every request so far.
        """
        for attempt in range(1 + self._retries):
            # Nobody waits for a thousand pauses where the servers are dead.
            if len(self._given_up) >= self._patience and not self._answered:
                raise NoVerdict(f"no request was answered: {self._given_up[0]}")
            address = self._addresses[(number + attempt) % len(self._addresses)]
            try:
                reply = self._reply(address, body)
                self._answered = True
                return reply, value(reply)
            except NoVerdict as error:
                if attempt == self._retries:
                    self._given_up.append(str(error))
                    raise NoVerdict(f"{error} (asked {attempt + 1} times)") from error
            time.sleep(min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S))
        raise AssertionError("the last attempt returns or raises")

    def _reply(self, address: str, body: dict[str, Any]) -> str:
        try:
            response = self._client.post(f"{address}/chat/completions", json=body)
        except self._errors as error:
            raise NoVerdict(f"{address}: {type(error).__name__}: {error}") from error
        if response.status_code != 200:
            raise NoVerdict(f"{address}: HTTP status {response.status_code}: {response.text[:200]!r}")
        try:
            content = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise NoVerdict(f"{address}: the reply is no chat completion: {response.text[:200]!r}") from error
        if not isinstance(content, str):
            raise NoVerdict(f"{address}: the reply has no text: {response.text[:200]!r}")
        return content


class _Replies:
    """Replies that are known from earlier, by the content of the request."""

    def __init__(self, file: sqlite3.Connection | None) -> None:
        self._file = file

    @classmethod
    @contextmanager
    def opened(cls, path: str | None) -> Iterator[_Replies]:
        if path is None:
            yield cls(None)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=CACHE_LOCK_S, isolation_level=None)) as file:
            file.execute("CREATE TABLE IF NOT EXISTS replies (request TEXT PRIMARY KEY, reply TEXT NOT NULL)")
            yield cls(file)

    def get(self, key: str) -> str | None:
        if self._file is None:
            return None
        found = self._file.execute("SELECT reply FROM replies WHERE request = ?", (key,)).fetchone()
        return None if found is None else found[0]

    def put(self, key: str, reply: str) -> None:
        if self._file is not None:
            self._file.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, reply))


def _outcome(value: Callable[[str], float], reply: str) -> float | Exception:
    try:
        return value(reply)
    except NoVerdict as error:  # it had one when it was kept: the recipe reads replies otherwise now
        return error


def _key(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _filled(prompt: str, sample: Sample, response: Response) -> str:
    """Fill in the prompt; what is filled in is not looked at again, whatever a model has written."""
    texts = {
        "question": sample.question,
        "reference": sample.answer,
        "answer": response.answer or "",
        "response": response.text,
    }
    return _PLACE.sub(lambda match: texts[match.group(1)], prompt)


def _headers(api_key_env: str | None) -> dict[str, str]:
    if api_key_env is None:
        return {}
    if api_key_env not in os.environ:
        raise ValueError(f"env.reward_options.judge.api_key_env: there is no environment variable {api_key_env}")
    return {"Authorization": f"Bearer {os.environ[api_key_env]}"}


def _image_part(image: Any) -> dict[str, Any]:
    """Return an image as a part of a chat message: a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}
