# SPDX-License-Identifier: Apache-2.0
"""What is called in vLLM is there under that name and takes what it is given."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from vllm import LLM, EngineArgs, RequestOutput
from vllm.distributed.weight_transfer import base as transfer
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
)
from vllm.inputs import mm_input, tokens_input
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader import reload as layerwise
from vllm.platforms import current_platform
from vllm.v1.engine.llm_engine import LLMEngine

from megatron_g2rpo.rollout.vllm import server_engine
from megatron_g2rpo.rollout.vllm.translate import ENGINE_ARGUMENTS, engine_arguments
from tests.vllm import common


def takes(function: Any, *positional: object, **keywords: object) -> None:
    """Fails where a function, given as that of a class, does not take a call."""
    inspect.signature(function).bind(*positional, **keywords)


def test_llm_has_the_methods_that_the_engine_in_process_calls():
    takes(LLM._render_and_add_requests, None, [], [])
    takes(LLM.wait_for_completion, None, use_tqdm=False)
    takes(LLM.apply_model, None, lambda model: None)
    takes(LLM.sleep, None, level=2)
    takes(LLM.wake_up, None, tags=["weights"])
    takes(LLM.reset_prefix_cache, None)
    takes(LLM.reset_mm_cache, None)
    takes(LLMEngine.reset_encoder_cache, None)
    assert inspect.signature(LLM.reset_prefix_cache).return_annotation in (bool, "bool")
    assert callable(current_platform.is_sleep_mode_available)
    assert "outputs" in inspect.signature(RequestOutput).parameters


def test_the_engine_takes_every_argument_that_a_recipe_gives():
    given = engine_arguments(common.load_recipe().policy, "float32")
    further = {"load_format", "enable_sleep_mode", "disable_log_stats", "distributed_executor_backend"}
    assert given.keys() | further | {"weight_transfer_config"} <= inspect.signature(EngineArgs).parameters.keys()
    assert ENGINE_ARGUMENTS.items() <= given.items()


def test_rendered_prompts_are_what_the_private_entrance_takes():
    assert tokens_input([1, 2])["prompt_token_ids"] == [1, 2]
    takes(mm_input, [1], mm_kwargs=None, mm_hashes={}, mm_placeholders={})


def test_the_layerwise_reload_is_where_the_reload_looks_for_it():
    takes(layerwise.initialize_layerwise_reload, nn.Module())
    takes(layerwise.finalize_layerwise_processing, nn.Module(), None)
    takes(layerwise.finalize_layerwise_reload, nn.Module(), None)
    assert issubclass(ParallelLMHead, VocabParallelEmbedding)


def test_nccl_takes_what_the_trainer_passes():
    info = NCCLTrainerInitInfo(rank=1, master_address="10.0.0.1", master_port=29400, world_size=5)
    assert not info.is_sender
    takes(NCCLTrainerWeightTransferEngine.trainer_init, info, client=None, source=None)
    takes(NCCLTrainerWeightTransferEngine.send_weights, None)
    takes(NCCLTrainerWeightTransferEngine.shutdown, None)
    assert issubclass(NCCLTrainerWeightTransferEngine, transfer.TrainerWeightTransferEngine)


def test_the_client_is_a_weight_sync_client_of_vllm():
    client = server_engine._Client(SimpleNamespace())  # type: ignore[arg-type]
    assert isinstance(client, transfer.VLLMWeightSyncClient)
    for name in ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"):
        theirs = inspect.signature(getattr(transfer.VLLMWeightSyncClient, name)).parameters
        ours = inspect.signature(getattr(server_engine._Client, name)).parameters
        assert [*ours] == [*theirs], name


def test_a_missing_parameter_is_seen():
    """Negative: of ``takes``."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'fly'"):
        takes(LLM.wait_for_completion, None, fly=True)
