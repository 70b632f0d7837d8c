# SPDX-License-Identifier: Apache-2.0
"""Tokens in and tokens out: what a request says to vLLM's server, and what its answer says to the trainer."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.entrypoints.scale_out.token_in_token_out.mm_features import mm_kwargs_from_features
from vllm.entrypoints.scale_out.token_in_token_out.protocol import (
    GenerateRequest,
    GenerateTokensChoice,
    GenerateTokensResponse,
    MultiModalFeatures,
)
from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
from vllm.logprobs import Logprob
from vllm.outputs import WeightVersionSpan

from megatron_g2rpo.rollout.base import Sampling
from megatron_g2rpo.rollout.vllm import server_engine
from megatron_g2rpo.rollout.vllm.server_engine import VllmServerEngine
from megatron_g2rpo.rollout.vllm.translate import Translator
from tests.vllm import common
from tests.vllm.contract.updates import ADDRESSES, VERSION, settings


@pytest.fixture
def engine(tmp_path) -> VllmServerEngine:
    return VllmServerEngine(common.context(settings(tmp_path)))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=0.0),
        Sampling(temperature=0.7, top_p=0.9, top_k=20, min_p=0.05, stop_strings=("</answer>", "end")),
    ],
    ids=["plain", "greedy", "filtered"],
)
def test_a_request_says_to_the_server_what_the_engine_in_process_is_told(engine, tmp_path, sampling):
    translator = Translator(common.context(settings(tmp_path)))
    for prompt in common.make_prompts(3):  # with 0, 1 and 2 images
        body = engine._request(prompt, 4, sampling, 5).body
        assert body.keys() <= GenerateRequest.model_fields.keys(), "others would be dropped without a word"
        assert body["sampling_params"].keys() <= inspect.signature(SamplingParams).parameters.keys()
        request = GenerateRequest.model_validate_json(json.dumps(body))
        assert request.token_ids == prompt.inputs.token_ids.tolist()
        ours = translator.parameters(prompt, 4, sampling, 5)
        ours.output_kind = request.sampling_params.output_kind  # the server sets it itself
        assert repr(request.sampling_params) == repr(ours)
        assert request.sampling_params.logit_bias == ours.logit_bias
        assert request.sampling_params.seed == ours.seed
        images = translator.images(prompt)
        assert (request.features is None) == (images is None)
        if images is not None:
            assert body["features"].keys() <= MultiModalFeatures.model_fields.keys()
            assert request.features.mm_hashes == {"image": images.hashes}
            places = request.features.mm_placeholders["image"]
            assert [(p.offset, p.length) for p in places] == [(p.offset, p.length) for p in images.places]
            arrived = mm_kwargs_from_features(request.features)["image"]
            for there, here in zip(arrived, images.items["image"], strict=True):
                assert there.keys() == here.keys() == {"pixel_values", "image_grid_thw"}
                for name in here:
                    assert torch.equal(there[name].data, here[name].data), name
                    assert there[name].data.dtype == here[name].data.dtype
                    assert type(there[name].field) is type(here[name].field)
                    assert there[name].field.keep_on_cpu == here[name].field.keep_on_cpu


def answered(*logprobs: float, others: dict[int, float] | None = None) -> dict[str, Any]:
    """A choice as vLLM's server makes it of an engine's output and sends it; each token beside the same others."""
    ids = list(range(7, 7 + len(logprobs)))
    places = [
        {token: Logprob(logprob=value, rank=1)}
        | {other: Logprob(logprob=logprob, rank=2) for other, logprob in (others or {}).items()}
        for token, value in zip(ids, logprobs, strict=True)
    ]
    asked = 1 + len(others or {})
    content = ServingTokens._create_tokens_logprobs(None, ids, places, asked)  # type: ignore[arg-type]
    choice = GenerateTokensChoice(
        index=0, token_ids=ids, logprobs=content, weight_versions=[WeightVersionSpan(VERSION, 0, len(ids))]
    )
    response = GenerateTokensResponse(request_id="0", created=0, model="policy", choices=[choice], usage=None)
    return json.loads(response.model_dump_json())["choices"][0]


def test_an_answer_carries_tokens_logprobs_and_the_version_of_its_weights():
    choice = answered(-0.25, -3.5)
    assert server_engine._answer(choice)[:2] == ([7, 8], [-0.25, -3.5])
    assert {span["version"] for span in choice["weight_versions"]} == {VERSION}


def test_an_answer_says_what_its_tokens_were_sampled_from(tmp_path):
    """Tokens that the filters left out have no probability; over HTTP that is a number."""
    (prompt,) = common.make_prompts(1)
    translator = Translator(common.context(settings(tmp_path)))
    sampling = Sampling(temperature=1.0, top_k=2, return_kept=True)
    choice = answered(math.log(0.75), math.log(0.75), others={30: math.log(0.25), 31: -math.inf})
    (rollout,) = translator.rollouts(prompt, 0, 1, sampling, [server_engine._answer(choice)])
    assert rollout.kept_ids.tolist() == [[7, 30], [8, 30]]
    lacking = answered(math.log(0.75), others={30: math.log(0.2)})
    with pytest.raises(RuntimeError, match=r"sample 0: the 2 tokens .* have probability 0\.9500 together, not 1"):
        translator.rollouts(prompt, 0, 1, sampling, [server_engine._answer(lacking)])


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_logprob_that_is_no_number_is_an_error_over_http_too(tmp_path, value):
    """JSON has none, so vLLM sends a finite one instead: taken for real, it would end in the loss."""
    choice = answered(-0.25, value)
    assert math.isfinite(choice["logprobs"]["content"][1]["logprob"])
    (prompt,) = common.make_prompts(1)
    translator = Translator(common.context(settings(tmp_path)))
    with pytest.raises(RuntimeError, match=r"2 tokens with 1 finite .* the weights have diverged"):
        translator.rollouts(prompt, 0, 1, Sampling(temperature=1.0), [server_engine._answer(choice)])


def test_the_token_endpoint_takes_a_request_and_asks_for_tokens(applications, engine):
    """Through vLLM's application: as far as the handler that would ask the engine."""
    asked: list[GenerateRequest] = []

    class Handler:
        async def serve_tokens(self, request: GenerateRequest, raw_request: object) -> GenerateTokensResponse:
            asked.append(request)
            return GenerateTokensResponse(request_id="0", created=0, model="policy", choices=[], usage=None)

    client = applications[ADDRESSES[0]]
    client.app.state.serving_tokens = Handler()
    try:
        body = engine._request(common.make_prompts(2)[1], 4, Sampling(temperature=1.0), 5).body
        response = client.post("/inference/v1/generate", json=body)
    finally:
        client.app.state.serving_tokens = None
    assert response.status_code == 200, response.text
    assert [request.token_ids for request in asked] == [body["token_ids"]]
    assert response.json()["choices"] == []
    assert asyncio.iscoroutinefunction(ServingTokens.serve_tokens)
