# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# (vLLM has an environment of its own; tests/vllm/contract holds what is used of it.)
"""vLLM in the training process: every rank runs an engine, or ``tensor_parallel_size`` neighbouring ranks share one.

A shared engine works in the way of vLLM's external launcher: its ranks are given the same requests in the same order,
so that their schedulers decide alike, and each rank receives all answers.

Weights go into the live engine layer by layer (vLLM's layerwise reload): beside engine and policy, one layer is held in
memory, never a third copy of the model.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

# Read when vLLM is imported: the engine runs in this process, sends nothing home, and leaves the threads' places alone.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, RequestOutput
from vllm.distributed import get_tp_group
from vllm.inputs import EngineInput, mm_input, tokens_input
from vllm.platforms import current_platform

from megatron_g2rpo import progress
from megatron_g2rpo.rollout import base
from megatron_g2rpo.rollout.vllm import reload
from megatron_g2rpo.rollout.vllm.translate import Answer, Translator, engine_arguments
from megatron_g2rpo.types import Prompt, Rollout


@base.register("vllm")
class VllmEngine:
    """A vLLM engine in this process.

    Args:
        context: everything that the engine is built from. The weights of the model directory are not read: they
            come by ``load_weights``.

    Raises:
        ValueError: ``tensor_parallel_size`` does not divide the number of processes.
    """

    def __init__(self, context: base.Context) -> None:
        options = context.policy.generation.vllm_cfg
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world % options.tensor_parallel_size:
            raise ValueError(
                f"policy.generation.vllm_cfg.tensor_parallel_size ({options.tensor_parallel_size}) does not divide the "
                f"{world} processes of the job"
            )
        self._translator = Translator(context)
        # With more processes than one vLLM must make its groups out of the job's, also where each runs its own engine.
        executor = {"distributed_executor_backend": "external_launcher"} if world > 1 else {}
        arguments = {
            **engine_arguments(context.policy, str(context.dtype).removeprefix("torch.")),
            "load_format": "dummy",
            "enable_sleep_mode": options.sleep and current_platform.is_sleep_mode_available(),
            "disable_log_stats": True,
            **executor,
        }
        self._sleeps: bool = arguments["enable_sleep_mode"]
        self._asleep = self._loaded = False
        self._llm = LLM(**arguments)
        _advance_with(self._llm.llm_engine)
        self._shared = options.tensor_parallel_size > 1

    @classmethod
    def build(cls, context: base.Context) -> VllmEngine:
        return cls(context)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Put a stream of ``(Hugging Face checkpoint name, full tensor)`` into the live engine.

        Raises:
            ValueError: parameters of the engine's model did not come; it then refuses to generate.
        """
        self._loaded = False
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        model_config = self._llm.model_config
        (missing,) = self._llm.apply_model(partial(reload.reload, weights=weights, model_config=model_config))
        if missing:
            raise ValueError(reload.incomplete(missing))
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        self._forget()
        self._loaded = True

    def _forget(self) -> None:
        """Drop what was computed with the previous weights: keys and values, and encoded images.

        vLLM looks both up by the contents of a prompt. Without this call, a prompt that comes again would be answered
        with cached values of the previous weights.
        """
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests are still under way")
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()

    def generate(
        self, prompts: Sequence[Prompt], n: int, *, sampling: base.Sampling, seed: int, group_ids: Sequence[int]
    ) -> list[Rollout]:
        """Sample ``n`` responses to each prompt; see ``base.Engine.generate``.

        Raises:
            RuntimeError: no weights were loaded, or an answer cannot be used (the prompt is named).
            ValueError: arguments out of range, or a prompt that does not fit its images (it is named).
        """
        if not self._loaded:
            raise RuntimeError("the rollout engine has no complete set of weights: call load_weights first")
        base.check_request(prompts, n, group_ids)
        all_prompts, first = self._with_peers(prompts)
        inputs = [self._input(prompt) for prompt in all_prompts]
        parameters = [self._translator.parameters(prompt, n, sampling, seed) for prompt in all_prompts]
        # vLLM's own `generate` takes text and images; prompts that are rendered already enter one layer below it.
        self._llm._render_and_add_requests(inputs, parameters)
        outputs = self._llm.wait_for_completion(use_tqdm=False)
        rollouts: list[Rollout] = []
        mine = outputs[first : first + len(prompts)]
        for prompt, group_id, output in zip(prompts, group_ids, mine, strict=True):
            rollouts += self._translator.rollouts(prompt, group_id, n, sampling, _answers(output))
        return rollouts

    def release(self) -> None:
        """Free the memory of weights and cache until the next ``load_weights``, where the platform supports it."""
        if self._sleeps and not self._asleep:
            self._llm.sleep(level=2)
            self._asleep, self._loaded = True, False

    def _with_peers(self, prompts: Sequence[Prompt]) -> tuple[list[Prompt], int]:
        """Return the prompts of all ranks that share this engine, equal on each, and where this rank's own begin."""
        if not self._shared:
            return list(prompts), 0
        group = get_tp_group()
        gathered: list[list[Prompt]] = [[] for _ in range(group.world_size)]
        dist.all_gather_object(gathered, list(prompts), group=group.cpu_group)
        first = sum(map(len, gathered[: group.rank_in_group]))
        return [prompt for part in gathered for prompt in part], first

    def _input(self, prompt: Prompt) -> EngineInput:
        token_ids, images = prompt.inputs.token_ids.tolist(), self._translator.images(prompt)
        if images is None:
            return tokens_input(token_ids)
        return mm_input(
            token_ids,
            mm_kwargs=images.items,
            mm_hashes={"image": images.hashes},
            mm_placeholders={"image": images.places},
        )


def _advance_with(llm_engine: Any) -> None:
    """Let each step of the engine, one token of every running sequence, count as progress."""
    # Weak: in a cycle the engine, with its memory and vLLM's settings of the process, would outlive its last user.
    step = weakref.WeakMethod(llm_engine.step)

    def advancing() -> Any:
        progress.advance()
        method = step()
        assert method is not None  # the engine calls it
        return method()

    llm_engine.step = advancing


def _answers(output: Any) -> list[Answer]:
    assert isinstance(output, RequestOutput)
    answers = []
    for answer in sorted(output.outputs, key=lambda answer: answer.index):
        ids, places = list(answer.token_ids), answer.logprobs or []
        logprobs = [place[token].logprob for place, token in zip(places, ids, strict=False)]
        likeliest = [{token: each.logprob for token, each in place.items()} for place in places]
        answers.append(Answer(ids, logprobs, likeliest))
    return answers
