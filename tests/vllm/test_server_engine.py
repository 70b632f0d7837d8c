# SPDX-License-Identifier: Apache-2.0
"""Real servers over HTTP against transformers, and what becomes of a step when one is killed, and when both are.

The tests run in their order, on the same two servers, which the last ones kill.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from megatron_g2rpo.rollout.base import EngineUnavailable
from megatron_g2rpo.rollout.vllm.server_engine import VllmServerEngine
from megatron_g2rpo.weights import WeightSource
from tests.vllm import common
from tests.vllm.common import ATOL, RECIPE, forward_logprobs, generate, greedy, make_prompts, named, tokens_of
from tests.vllm.servers import ServerProcess, free_port, serving

pytestmark = pytest.mark.timeout(900)  # the start of two servers is most of it


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServerProcess]]:
    with serving(RECIPE, tmp_path_factory.mktemp("servers"), 2, f"policy.model_name={common.POLICY}") as both:
        yield both


@pytest.fixture(scope="module")
def engine(servers, tmp_path_factory: pytest.TempPathFactory) -> VllmServerEngine:
    section = "policy.generation.vllm_server_cfg"
    settings = common.load_recipe(
        "policy.generation.backend=vllm_server",
        f"{section}.addresses=[{', '.join(repr(server.address) for server in servers)}]",
        f"{section}.weights_dir={tmp_path_factory.mktemp('weights')}",
        f"{section}.heartbeat_s=2.0",
    )
    return VllmServerEngine(common.context(settings))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("models")
    return [common.random_model(root / str(seed), seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def prompts():
    return make_prompts(12)


def source(model: torch.nn.Module) -> WeightSource:
    return WeightSource(lambda: {n: t.to("meta") for n, t in named(model)}, lambda: iter(named(model)))


def test_it_waits_for_a_server_until_the_run_is_asked_to_stop(models):
    asked: list[bool] = []

    def is_asked_to_stop() -> bool:
        asked.append(True)
        return len(asked) > 3

    section = "policy.generation.vllm_server_cfg"
    nobody = f"http://127.0.0.1:{free_port()}"
    settings = common.load_recipe(
        "policy.generation.backend=vllm_server", f"{section}.addresses=['{nobody}']", f"{section}.on_no_server=wait"
    )
    waiting = VllmServerEngine(common.context(settings, is_asked_to_stop=is_asked_to_stop))
    with pytest.raises(EngineUnavailable, match=nobody):
        waiting.load_weights(source(models[0]))
    assert len(asked) == 5, "before the pause, in it, and after it"


def test_without_weights_it_does_not_generate(engine, prompts):
    with pytest.raises(RuntimeError, match="call load_weights first"):
        generate(engine, prompts)


def test_tokens_and_logprobs_are_those_of_transformers(engine, models, prompts):
    engine.load_weights(source(models[0]))
    for rollout in generate(engine, prompts, 1, temperature=0.0):
        assert rollout.response_ids.tolist() == greedy(models[0], rollout.prompt, 48), rollout.prompt.key
    for temperature in (1.0, 0.7):
        for rollout in generate(engine, prompts, 4, temperature=temperature):
            expected = forward_logprobs(models[0], rollout, temperature)
            torch.testing.assert_close(rollout.logprobs, expected, rtol=0, atol=ATOL)


def test_new_weights_reach_both_servers_for_repeated_images_too(engine, servers, models, prompts):
    engine.load_weights(source(models[1]))
    for rollout in generate(engine, prompts, 1, temperature=0.0):
        assert rollout.response_ids.tolist() == greedy(models[1], rollout.prompt, 48), rollout.prompt.key
    for server in servers:
        asked = server.log.read_text().count("/inference/v1/generate")
        assert asked >= 4 * len(prompts) // 3, f"{server.address} was asked {asked} times: prompts are not balanced"
    assert len(engine._servers.live) == 2


def test_killing_a_server_mid_generation_loses_no_prompt(engine, servers, prompts):
    expected = tokens_of(generate(engine, prompts, 8))
    (doomed,) = [server for server in engine._servers.everyone if server.address == servers[1].address]

    def kill_while_it_generates() -> None:
        # All its answers may come within one of this loop's turns. A server that is held still has not answered what is
        # under way there, unless the answer is on its way already.
        while True:
            if servers[1].running_requests() and doomed.under_way:
                servers[1].hold()
                time.sleep(0.2)
                if doomed.under_way:
                    servers[1].kill()
                    return
                servers[1].go_on()
            time.sleep(0.001)

    killer = threading.Thread(target=kill_while_it_generates, daemon=True)
    killer.start()
    # From anew as often as the server was quicker, with the tokens known: none but the last is lost in between.
    while killer.is_alive():
        assert tokens_of(generate(engine, prompts, 8)) == expected
    killer.join()
    assert doomed.lost is not None
    assert [server.address for server in engine._servers.live] == [servers[0].address]
    assert generate(engine, prompts[:2], 2), "the one that is left goes on"


def test_an_update_goes_on_with_the_server_that_is_left(engine, models, prompts):
    engine.load_weights(source(models[0]))
    for rollout in generate(engine, prompts[:4], 1, temperature=0.0):
        assert rollout.response_ids.tolist() == greedy(models[0], rollout.prompt, 48), rollout.prompt.key


def test_a_server_that_lost_its_weights_is_not_asked(engine, servers, prompts):
    """As after a restart: it is healthy, and would answer from whatever weights it has."""
    (live,) = engine._servers.live
    engine._servers.request(live, "POST", "/update_weight_version", json={"new_version": "default"})
    with pytest.raises(EngineUnavailable, match=rf"{live.address}: it answers with weights \['default'\] instead of"):
        generate(engine, prompts[:2], 2)


def test_killing_all_names_them_all(engine, servers, models, prompts):
    engine.load_weights(source(models[0]))
    servers[0].kill()
    with pytest.raises(EngineUnavailable) as error:
        generate(engine, prompts, 2)
    assert all(f"\n  {server.address}: " in str(error.value) for server in servers)
    assert "ConnectError" in str(error.value)
    with pytest.raises(EngineUnavailable, match="no rollout server is left"):
        engine.load_weights(source(models[0]))
