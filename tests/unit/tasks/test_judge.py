# SPDX-License-Identifier: Apache-2.0
"""Claims: a judge is asked once about each thing, again when it fails, and what it does not say is no reward."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.recipe import RecipeError
from megatron_g2rpo.tasks import judge as module
from megatron_g2rpo.tasks.judge import NoVerdict, judge
from tests.common.recipes import G2RPO
from tests.unit.tasks.common import make_response, make_sample

Reply = Callable[[str, int], tuple[int, bytes]]


def completion(text: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class Judge:
    """A server on this machine.

    Attributes:
        reply: from the text of a request, and how often it came before, to status and body.
        asked: the requests.
        most: largest number of requests that were under way at once.
        headers: headers of the last request.
    """

    def __init__(self) -> None:
        self.reply: Reply = lambda text, times: (200, completion("It is right. Score: 8"))
        self.asked: list[dict[str, Any]] = []
        self.most = self._now = 0
        self.headers: dict[str, str] = {}
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/chat/completions"
                with lock:
                    times = outer.asked.count(body)
                    outer.asked.append(body)
                    outer._now += 1
                    outer.most, outer.headers = max(outer.most, outer._now), dict(self.headers)
                content = body["messages"][0]["content"]
                text = content if isinstance(content, str) else content[-1]["text"]
                status, reply = outer.reply(text, times)
                with lock:
                    outer._now -= 1
                self.send_response(status)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, format: str, *arguments: Any) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None: ...  # a client that has gone

        self._server = Server(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Judge]:
    server = Judge()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.001)


def ask(server: Judge, *answers: str | None, **options: Any) -> list[float | Exception]:
    samples = [make_sample(question=f"Question {number}?", answer="12") for number in range(len(answers))]
    responses = [make_response(f"<answer>{answer}</answer>", answer=answer) for answer in answers]
    return judge(samples, responses, **({"addresses": [server.address], "model": "m", "retries": 2} | options))


def test_verdicts_are_scaled_and_a_response_without_an_answer_is_worth_nothing(server: Judge) -> None:
    server.reply = lambda text, times: (200, completion(f"Score: 10\nNo. Score: {re.findall('Answer: (.*)', text)[0]}"))
    assert ask(server, "5", None, "10", "2.5") == [0.5, 0.0, 1.0, 0.25]
    assert len(server.asked) == 3
    body = next(body for body in server.asked if "Answer: 2.5" in body["messages"][0]["content"])
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.0, 512)
    assert "Question: Question 3?" in body["messages"][0]["content"]
    assert "Reference answer: 12" in body["messages"][0]["content"]


def test_what_a_model_wrote_is_filled_in_as_it_is(server: Judge) -> None:
    ask(server, "{reference} \\1 {x}", prompt="{answer}|{reference}|{response}|{other}")
    expected = "{reference} \\1 {x}|12|<answer>{reference} \\1 {x}</answer>|{other}"
    assert server.asked[0]["messages"][0]["content"] == expected
    ask(server, None, prompt="{response}")
    assert server.asked[1]["messages"][0]["content"] == "<answer>None</answer>", "the prompt shows more than the answer"


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (500, b"out of memory", "HTTP status 500: 'out of memory'"),
        (404, b"no such model", "HTTP status 404"),
        (200, b"<html>", "the reply is no chat completion: '<html>'"),
        (200, b"[1]", "the reply is no chat completion"),
        (200, completion(None), "the reply has no text"),
        (200, completion("I like it."), r"the reply has no verdict \(.*I like it"),
        (200, completion("Score: 11"), "the verdict 11 is not between 0 and 10"),
    ],
)
def test_a_wrong_reply_is_asked_for_again_and_then_no_reward(
    server: Judge, status: int, body: bytes, message: str
) -> None:
    good = completion("Score: 10")
    server.reply = lambda text, times: (status, body) if "Answer: bad" in text or times < 2 else (200, good)
    (recovered,) = ask(server, "slow to start")
    assert recovered == 1.0, "right at the third attempt"
    good_value, error = ask(server, "good", "bad")
    assert good_value == 1.0
    assert isinstance(error, NoVerdict)
    assert re.search(message, str(error))
    assert "(asked 3 times)" in str(error)


def test_a_server_that_is_slow_has_a_time_limit(server: Judge) -> None:
    server.reply = lambda text, times: (time.sleep(0.0 if times else 0.6), (200, completion("Score: 10")))[1]
    start = time.monotonic()
    assert ask(server, "5", timeout_s=0.2) == [1.0], "the second attempt is fast"
    assert time.monotonic() - start < 0.6
    (error,) = ask(server, "6", timeout_s=0.2, retries=0)
    assert isinstance(error, NoVerdict)
    assert "ReadTimeout" in str(error)


def test_a_dead_server_costs_all_rewards_but_not_a_thousand_pauses(
    server: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.close()
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.1)
    start = time.monotonic()
    errors = ask(server, *(str(number) for number in range(200)), concurrency=2, retries=1)
    assert time.monotonic() - start < 5.0, "200 requests, two at a time, with a pause each, would take 10 s"
    assert len(errors) == 200
    assert all(isinstance(error, NoVerdict) and "ConnectError" in str(error) for error in errors)


def test_another_address_is_asked_when_one_is_dead(server: Judge) -> None:
    dead = Judge()
    dead.close()
    addresses = [dead.address, server.address + "/"]
    assert ask(server, "1", "2", addresses=addresses, retries=1) == [0.8, 0.8]


def test_requests_are_side_by_side_up_to_the_bound(server: Judge) -> None:
    server.reply = lambda text, times: (time.sleep(0.05), (200, completion("Score: 8")))[1]
    assert ask(server, *map(str, range(12)), concurrency=4) == [0.8] * 12
    assert server.most == 4


def test_the_same_is_asked_once_and_kept_for_the_next_time(server: Judge, tmp_path: Path) -> None:
    cache = str(tmp_path / "new" / "verdicts.sqlite")
    samples, responses = [make_sample()] * 3, [make_response(answer="12")] * 3
    options: dict[str, Any] = {"addresses": [server.address], "model": "m", "cache": cache}
    assert judge(samples, responses, **options) == [0.8] * 3
    assert len(server.asked) == 1
    assert judge(samples, responses, **options) == [0.8] * 3
    assert judge(samples, responses, **options, highest=16.0) == [0.5] * 3, "the reply is kept, not what is read of it"
    assert len(server.asked) == 1
    judge(samples, responses, **{**options, "model": "another"})
    assert len(server.asked) == 2
    server.reply = lambda text, times: (500, b"")
    ask(server, "7", cache=cache, retries=0)
    server.reply = lambda text, times: (200, completion("Score: 8"))
    assert ask(server, "7", cache=cache, retries=0) == [0.8], "a failure is not kept"


def test_images_are_sent_as_data_urls(server: Judge) -> None:
    image = Image.new("RGB", (5, 3), "red")
    judge(
        [make_sample(images=(image,))], [make_response(answer="1")], addresses=[server.address], model="m", images=True
    )
    first, text = server.asked[0]["messages"][0]["content"]
    assert text["type"] == "text"
    kind, _, data = first["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    sent = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (sent.size, sent.getpixel((0, 0))) == ((5, 3), (255, 0, 0))


def test_the_key_comes_from_the_environment(server: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", "secret")
    ask(server, "1", api_key_env="THE_KEY")
    assert server.headers["Authorization"] == "Bearer secret"
    with pytest.raises(ValueError, match="there is no environment variable NO_KEY"):
        ask(server, "1", api_key_env="NO_KEY")


def test_a_recipe_s_options_are_checked_before_anything_starts() -> None:
    weighed = ["env.reward_weights.judge=0.3", "env.reward_options={judge: {addresses: ['http://a/v1'], model: m}}"]
    options = recipes.load(G2RPO, weighed, "train").env.reward_options["judge"]
    assert options["addresses"] == ["http://a/v1"]
    assert options["concurrency"] == 32, "defaults are filled in"
    wrong = {
        "env.reward_weights.judge=0.3": r"env\.reward_options\.judge\.addresses': Field required",
        "env.reward_options={judge: {addresses: [], model: m}}": r"judge\.addresses': List should have at least 1",
        "env.reward_options={judge: {addresses: [a], model: m, retrys: 1}}": r"no option 'retrys' \(did you mean 'ret",
        "env.reward_options={jugde: {model: m}}": r"unknown reward part 'jugde' \(did you mean 'judge'\?\)",
        "env.reward_options={format: {scale: 1}}": r"reward part 'format' takes no option 'scale'",
        "env.reward_options={judge: 3}": "'env.reward_options.judge' must be a mapping of keys, got 3",
    }
    for override, message in wrong.items():
        with pytest.raises(RecipeError, match=message):
            recipes.load(G2RPO, [override], "train")
