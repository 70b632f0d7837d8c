# SPDX-License-Identifier: Apache-2.0
"""The client of the rollout servers against small HTTP servers that answer, refuse, stall and die as they are told.

No vLLM runs here: what its servers really answer is for ``contract`` and ``test_vllm_server``. Times are small and
bounds are wide: a bound separates what was asked for from waiting for a timeout that is much longer.
"""

from __future__ import annotations

import pickle
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from megatron_g2rpo.recipe import VllmServerConfig
from megatron_g2rpo.rollout.base import EngineUnavailable
from megatron_g2rpo.rollout.vllm import http_client
from megatron_g2rpo.rollout.vllm.http_client import API_KEY, Request, ServerLost, Servers
from tests.vllm.fake_server import GENERATE, VERSION, Fake, Reply, choices, fine


@pytest.fixture
def start() -> Iterator[Callable[..., Fake]]:
    """Makes fake servers that end with the test."""
    fakes: list[Fake] = []

    def make(*args: Any, **keywords: Any) -> Fake:
        fakes.append(Fake(*args, **keywords))
        return fakes[-1]

    yield make
    for fake in fakes:
        fake.kill()


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a machine that hangs: the kernel takes connections, and nobody answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "_PAUSE", 0.05)
    monkeypatch.delenv(API_KEY, raising=False)
    # Nothing here is https, and reading the certificates takes longer than all requests of a test.
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)


def options(*servers: Fake | str, **changes: object) -> VllmServerConfig:
    values: dict[str, Any] = {
        "addresses": [server if isinstance(server, str) else server.address for server in servers],
        "weight_transfer": "files",
        "weights_dir": "weights",
        "max_concurrent_requests": 64,
        "request_timeout_s": 30.0,
        "heartbeat_s": 1.0,
        "retries": 3,
        "on_no_server": "fail",
        **changes,
    }
    return VllmServerConfig(**values)


def ask(servers: Servers, count: int) -> list[int]:
    """Generate for ``count`` prompts; the token of each answer, in order."""
    requests = [Request(f"prompt 'shard/{number}'", {"token_ids": [number]}) for number in range(count)]
    return [choice["token_ids"][0] for answer in servers.generate(requests, VERSION) for choice in answer]


def lost(servers: Servers) -> dict[str, str]:
    return {server.address: server.lost for server in servers.everyone if server.lost is not None}


# -- which server -----------------------------------------------------------------------------------------------


def test_prompts_are_balanced_over_the_servers_and_answers_keep_their_order(start):
    def later_ones_first(fake: Fake, prompt: int) -> Reply:
        time.sleep(0.2 - prompt * 0.005)
        return fine(fake, prompt)

    both = [start(later_ones_first), start(later_ones_first)]
    assert ask(Servers(options(*both)), 40) == list(range(40))
    assert [len(fake.asked) for fake in both] == [20, 20]


def test_the_less_busy_server_gets_the_next_prompt(start):
    fast = start()

    def after_all_others(fake: Fake, prompt: int) -> Reply:
        while len(fast.asked) < 22 and not fake.gone.wait(0.01):
            pass
        return fine(fake, prompt)

    slow = start(after_all_others)
    assert ask(Servers(options(slow, fast, max_concurrent_requests=4)), 24) == list(range(24))
    assert len(slow.asked) == 2, "two of the first four; then whoever answers is asked again"


def test_each_process_begins_with_another_server(start):
    both = [start(), start()]
    for first, expected in enumerate([both[0], both[1], both[0]]):
        servers = Servers(options(*both), first=first)
        before = len(expected.asked)
        assert servers.everyone[0].address == expected.address
        ask(servers, 1)
        assert len(expected.asked) == before + 1


def test_no_more_prompts_are_under_way_than_the_recipe_says(start):
    def slowly(fake: Fake, prompt: int) -> Reply:
        time.sleep(0.05)
        return fine(fake, prompt)

    fake = start(slowly)
    assert ask(Servers(options(fake, max_concurrent_requests=3)), 12) == list(range(12))
    assert fake.most == 3


def test_without_prompts_nobody_is_asked(start):
    fake = start()
    assert ask(Servers(options(fake)), 0) == []
    assert not fake.asked


# -- a server that goes down ------------------------------------------------------------------------------------


def test_what_a_killed_server_had_under_way_is_done_by_the_other(start):
    def until_killed(fake: Fake, prompt: int) -> Reply:
        if len(fake.asked) == 5:
            threading.Thread(target=fake.kill).start()
        fake.gone.wait()
        return None

    doomed, other = start(until_killed), start()
    servers = Servers(options(doomed, other))
    begin = time.monotonic()
    assert ask(servers, 20) == list(range(20))
    assert time.monotonic() - begin < 10.0, "of the 30 s of a request"
    assert 5 <= len(doomed.asked) <= 10, "the check needs requests under way"
    assert sorted(other.prompts) == list(range(20)), "each once: its own, and what the other had"
    (cause,) = lost(servers).values()
    assert "and its health check failed" in cause


def test_a_killed_server_is_not_asked_again(start):
    doomed, other = start(), start()
    servers = Servers(options(doomed, other))
    doomed.kill()
    assert ask(servers, 6) == list(range(6))
    assert [server.address for server in servers.live] == [other.address]
    assert ask(servers, 6) == list(range(6))
    assert len(other.asked) == 12


def test_a_hanging_server_is_lost_by_its_heartbeats(start, silent):
    other = start()
    servers = Servers(options(silent, other, heartbeat_s=0.2))
    begin = time.monotonic()
    assert ask(servers, 10) == list(range(10))
    # Three checks, each begun a heartbeat after the one before, which took no longer than one: 1.2 s.
    assert 0.6 <= time.monotonic() - begin < 10.0, "of the 30 s of a request"
    assert lost(servers) == {silent: "3 health checks in a row failed"}


def test_without_heartbeats_a_hanging_server_would_hold_the_call_for_a_whole_request(start, silent):
    """Negative: so the test above is about heartbeats."""
    other = start()
    servers = Servers(options(silent, other, heartbeat_s=20.0, request_timeout_s=1.0))
    begin = time.monotonic()
    assert ask(servers, 10) == list(range(10))
    assert time.monotonic() - begin >= 1.0
    assert lost(servers)[silent].startswith("no answer within 1 s")


def test_a_healthy_server_that_does_not_answer_in_time_is_lost(start):
    def never(fake: Fake, prompt: int) -> Reply:
        fake.gone.wait()
        return None

    stuck, other = start(never), start()
    servers = Servers(options(stuck, other, request_timeout_s=0.5, heartbeat_s=0.5))
    assert ask(servers, 4) == list(range(4))
    assert lost(servers) == {stuck.address: "no answer within 0.5 s (ReadTimeout)"}


def test_a_server_that_answers_every_third_health_check_is_kept(start):
    def after_nine_checks(fake: Fake, prompt: int) -> Reply:
        while len(fake.keys) <= 9 and not fake.gone.wait(0.01):  # one of them is this prompt's
            pass
        return fine(fake, prompt)

    fake = start(after_nine_checks)
    fake.health = lambda: 200 if len(fake.keys) % 3 == 0 else 503
    servers = Servers(options(fake, heartbeat_s=0.02))
    assert ask(servers, 1) == [0]
    assert not lost(servers)


# -- a server that fails, or refuses ----------------------------------------------------------------------------


def fails(times: int, reply: Reply) -> Callable[[Fake, int], Reply]:
    """The first ``times`` prompts get another reply."""
    return lambda fake, prompt: reply if len(fake.asked) <= times else fine(fake, prompt)


@pytest.mark.parametrize("reply", [(500, "CUDA error"), (503, "busy"), (429, "slow down"), None], ids=str)
def test_what_fails_twice_is_tried_again_after_growing_pauses(start, monkeypatch, reply):
    monkeypatch.setattr(http_client, "_PAUSE", 0.1)
    fake = start(fails(2, reply))
    servers = Servers(options(fake, retries=2))
    assert ask(servers, 1) == [0]
    assert not lost(servers)
    first, second, third = (when for when, _ in fake.asked)
    assert second - first >= 0.1
    assert third - second >= 0.2


def test_what_always_fails_on_a_healthy_server_loses_it_after_the_retries(start):
    broken, other = start(fails(10**9, (500, "CUDA error"))), start()
    servers = Servers(options(broken, other, retries=2))
    assert ask(servers, 1) == [0]
    assert broken.prompts == [0, 0, 0]
    assert other.prompts == [0]
    assert lost(servers) == {broken.address: "3 tries of one request failed, the last one with: HTTP 500: CUDA error"}


def test_what_fails_on_a_sick_server_loses_it_at_once(start):
    sick, other = start(fails(10**9, (500, "engine is dead"))), start()
    sick.health = 503
    servers = Servers(options(sick, other))
    assert ask(servers, 1) == [0]
    assert sick.prompts == [0]
    assert lost(servers) == {sick.address: "HTTP 500: engine is dead, and its health check failed"}


def test_a_wrong_request_is_an_error_that_names_the_prompt_at_once(start):
    def refuses_three(fake: Fake, prompt: int) -> Reply:
        return (400, "the prompt is too long") if prompt == 3 else fine(fake, prompt)

    both = [start(refuses_three), start(refuses_three)]
    servers = Servers(options(*both))
    with pytest.raises(RuntimeError, match=r"^prompt 'shard/3': http://.* refuses it: HTTP 400: the prompt is too lo"):
        ask(servers, 8)
    assert sum(fake.prompts.count(3) for fake in both) == 1, "no server can do better"
    assert not lost(servers)


@pytest.mark.parametrize("versions", [("default",), ("0123456789ab-6",), (VERSION, "0123456789ab-8"), ()], ids=str)
def test_answers_of_other_weights_are_not_used_and_lose_the_server(start, versions):
    stale, other = start(lambda fake, prompt: (200, choices(prompt, *versions))), start()
    servers = Servers(options(stale, other))
    assert ask(servers, 4) == list(range(4))
    assert sorted(other.prompts) == list(range(4))
    assert lost(servers) == {stale.address: f"it answers with weights {sorted(versions)} instead of {VERSION}"}


# -- none left --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("on_no_server", "wait"), [("fail", False), ("wait", True)])
def test_when_none_is_left_the_error_lists_every_address_and_cause(start, silent, on_no_server, wait):
    stale = start(lambda fake, prompt: (200, choices(prompt, "old")))
    broken, dead = start(fails(10**9, (500, "no"))), start()
    dead.kill()
    servers = Servers(options(stale, broken, dead, silent, heartbeat_s=0.2, retries=0, on_no_server=on_no_server))
    with pytest.raises(EngineUnavailable) as error:
        ask(servers, 8)
    lines = str(error.value).splitlines()
    assert "no rollout server is left" in lines[0]
    causes = dict(line.strip().split(": ", 1) for line in lines[1:])
    assert causes.keys() == {stale.address, broken.address, dead.address, silent}
    assert causes[stale.address] == f"it answers with weights ['old'] instead of {VERSION}"
    assert causes[broken.address] == "1 tries of one request failed, the last one with: HTTP 500: no"
    assert causes[dead.address].startswith("ConnectError")
    assert causes[silent] == "3 health checks in a row failed"
    assert error.value.wait is wait
    # Rank 0 sends it to the other ranks.
    assert pickle.loads(pickle.dumps(error.value)).wait is wait


def test_every_request_that_fails_for_want_of_servers_ends_the_call(start):
    """The error is the exception itself, not a group of as many as there are prompts."""
    dead = start()
    dead.kill()
    with pytest.raises(EngineUnavailable, match=dead.address):
        ask(Servers(options(dead)), 20)


# -- control ----------------------------------------------------------------------------------------------------


def test_find_revives_a_server_that_came_back_and_loses_one_that_went(start):
    first, second = start(), start()
    servers = Servers(options(first, second))
    first.kill()
    servers.find()
    assert lost(servers).keys() == {first.address}
    assert lost(servers)[first.address].startswith("GET /health: ConnectError")
    back = start(port=first.port)
    second.kill()
    servers.find()
    assert lost(servers).keys() == {second.address}
    assert ask(servers, 3) == [0, 1, 2]
    assert sorted(back.prompts) == [0, 1, 2], "requests under way at once arrive in any order"


def test_find_does_not_wait_for_a_server_that_hangs(start, silent):
    other = start()
    servers = Servers(options(silent, other, heartbeat_s=1.0))
    begin = time.monotonic()
    servers.find()
    assert time.monotonic() - begin < 10.0, "of the 30 s of a request"
    assert lost(servers) == {silent: "GET /health: ReadTimeout: timed out"}


def test_a_request_to_all_goes_to_the_live_ones_and_loses_those_that_fail(start):
    all_three = [start(), start(), start()]
    servers = Servers(options(*all_three))
    servers.use([all_three[0].address, all_three[1].address])
    all_three[1].health = 500
    servers.post("/resume")
    assert [fake.posted for fake in all_three] == [["/resume"], ["/resume"], []]
    assert [server.address for server in servers.live] == [all_three[0].address]
    assert lost(servers)[all_three[1].address] == "POST /resume: HTTP 500: {}"
    assert lost(servers)[all_three[2].address] == "it was lost to another process of the run"
    all_three[0].health = 500
    with pytest.raises(EngineUnavailable, match=r"POST /resume: HTTP 500"):
        servers.post("/resume")


# -- the key ----------------------------------------------------------------------------------------------------


def test_the_key_is_sent_with_every_request(start, monkeypatch):
    monkeypatch.setenv(API_KEY, "open sesame")
    fake = start()
    servers = Servers(options(fake))
    servers.find()
    servers.post("/pause?mode=wait")
    ask(servers, 1)
    assert {path for path, _ in fake.keys} == {"/health", "/pause?mode=wait", GENERATE}
    assert {key for _, key in fake.keys} == {"Bearer open sesame"}


def test_without_a_key_none_is_sent(start):
    fake = start()
    servers = Servers(options(fake))
    servers.find()
    ask(servers, 1)
    assert {key for _, key in fake.keys} == {None}


def test_a_server_that_asks_for_a_key_names_the_variable(start):
    fake = start(lambda fake, prompt: (401, '{"error": "Unauthorized"}'))
    fake.health = 401
    servers = Servers(options(fake))
    hint = r"HTTP 401: .*\(set MEGATRON_G2RPO_API_KEY to the servers' key\)"
    with pytest.raises(ServerLost, match=hint):
        servers.request(servers.everyone[0], "POST", "/resume")
    with pytest.raises(RuntimeError, match=r"prompt 'shard/0'.* refuses it: " + hint):
        ask(servers, 1)


def test_each_answer_is_handed_over_as_soon_as_it_is_there(start):
    def later_ones_first(fake: Fake, prompt: int) -> Reply:
        time.sleep(0.4 - prompt * 0.1)
        return fine(fake, prompt)

    finished: list[tuple[int, int]] = []
    servers = Servers(options(start(later_ones_first)))
    requests = [Request(f"prompt 'shard/{number}'", {"token_ids": [number]}) for number in range(4)]
    servers.generate(requests, VERSION, lambda index, choices: finished.append((index, choices[0]["token_ids"][0])))
    assert finished == [(3, 3), (2, 2), (1, 1), (0, 0)]
