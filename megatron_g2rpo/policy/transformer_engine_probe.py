# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
# (Transformer Engine is on machines with GPUs; tests/contract holds what is used of it.)
"""Asks the installed Transformer Engine what it can do, in a process of its own.

    python -m megatron_g2rpo.policy.transformer_engine_probe '{"attention": null}'

It prints one line of JSON, the fields of ``Answer``. The process is its own because loading Transformer Engine takes
seconds, and half an installation of it raises, or ends the process, where megatron-core would.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_g2rpo.policy.machine import last_line, run_python


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """What decides Transformer Engine's choice of an attention kernel for packed rows, on one rank.

    Attributes:
        dtype: ``float32`` or ``bfloat16``, of queries, keys and values.
        heads, groups: number of query heads and of key/value heads.
        head_dim: size of a head.
        sequences: number of sequences of a row.
        longest: tokens of the longest sequence, over all context-parallel ranks.
        tokens: tokens of a row on this rank.
        padded: whether padding follows sequences.
        context: number of context-parallel ranks.
        cp_comm_type: how they exchange keys and values.
        shared_prefix: whether responses share their prompt: rows then have sequences with more keys than queries, for
            which ``policy.attention`` leaves out padding, and gathers keys and values itself.
    """

    dtype: str
    heads: int
    groups: int
    head_dim: int
    sequences: int
    longest: int
    tokens: int
    padded: bool
    context: int
    cp_comm_type: str
    shared_prefix: bool


@dataclass(frozen=True)
class Answer:
    """What Transformer Engine said.

    Attributes:
        core_error: why its core, ``import transformer_engine``, cannot be loaded; None: it can.
        torch_error: why its PyTorch part, ``import transformer_engine.pytorch``, cannot be loaded; None: it can.
        cudnn: version of cuDNN that it loads.
        fp8: FP8 recipe, in Megatron's names -> why it is not available; empty text: it is.
        attention: the attention backend that it would take; empty text for none; None where it was not asked.
        excluded: what it said about the backends that it would not take.
        shared_attention, shared_excluded: the same of rows in which responses share their prompt.
    """

    core_error: str | None = None
    torch_error: str | None = None
    cudnn: str | None = None
    fp8: Mapping[str, str] = field(default_factory=dict)
    attention: str | None = None
    excluded: tuple[str, ...] = ()
    shared_attention: str | None = None
    shared_excluded: tuple[str, ...] = ()


def ask(shape: AttentionShape | None) -> Answer:
    """Ask the installed Transformer Engine.

    Args:
        shape: the attention to ask about; None: not asked.
    """
    question = json.dumps({"attention": None if shape is None else dataclasses.asdict(shape)})
    try:
        done = run_python(["-m", __name__, question])
    except subprocess.TimeoutExpired as error:
        return Answer(core_error=f"importing it took more than {error.timeout:.0f} s")
    if done.returncode:
        reason = last_line(done.stderr) or "nothing was said"
        return Answer(core_error=f"importing it ended the process with status {done.returncode}: {reason}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return Answer(**{**answer, **{name: tuple(answer[name]) for name in ("excluded", "shared_excluded")}})


def _answer(shape: AttentionShape | None) -> Answer:
    """Answer in this process, which loads Transformer Engine."""
    if error := _error(lambda: __import__("transformer_engine")):
        return Answer(core_error=error)
    if error := _error(lambda: __import__("transformer_engine.pytorch")):
        return Answer(torch_error=error)
    attention, excluded = (None, ()) if shape is None else _attention(shape)
    shared, shared_excluded = (None, ())
    if shape is not None and shape.shared_prefix:
        alone = dataclasses.replace(shape, padded=False, context=1)
        shared, shared_excluded = _attention(alone, bottom_right=True)
    return Answer(
        cudnn=_cudnn(),
        fp8=_fp8(),
        attention=attention,
        excluded=excluded,
        shared_attention=shared,
        shared_excluded=shared_excluded,
    )


def _error(action: Callable[[], Any]) -> str | None:
    try:
        action()
    except Exception as error:  # noqa: BLE001 - whatever it raises, megatron-core would meet it
        return f"{type(error).__name__}: {error}"
    return None


def _cudnn() -> str:
    from transformer_engine.pytorch.utils import get_cudnn_version

    return ".".join(map(str, get_cudnn_version()))


def _fp8() -> dict[str, str]:
    from transformer_engine.pytorch import quantization

    per_tensor = quantization.is_fp8_available
    asked = {
        "tensorwise": per_tensor,
        "delayed": per_tensor,
        "blockwise": quantization.is_fp8_block_scaling_available,
        "mxfp8": quantization.is_mxfp8_available,
    }
    found: dict[str, str] = {}
    for recipe, available in asked.items():
        try:
            usable, reason = available(return_reason=True)
        except RuntimeError as error:  # no driver: it raises instead of saying no
            usable, reason = False, str(error)
        found[recipe] = "" if usable else (reason or "no reason was given")
    return found


class _Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(level=logging.DEBUG)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _attention(shape: AttentionShape, *, bottom_right: bool = False) -> tuple[str, tuple[str, ...]]:
    """Return the backend that Transformer Engine selects, and what it says of those that it does not.

    Args:
        shape: the attention.
        bottom_right: whether the last query of a sequence, not the first, is beside the key of the same number.
    """
    import torch
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    dtype = getattr(torch, shape.dtype)
    messages = _Messages()
    logging.getLogger("DotProductAttention").addHandler(messages)
    utils.AttentionLogging._log_level = logging.DEBUG
    deterministic = os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1") == "0"
    flash, _, fused, _, unfused, _ = utils.get_attention_backend(
        utils.AttentionParams(
            qkv_dtype=dtype,
            nominal_dtype=dtype,
            qkv_layout="thd_thd_thd",
            batch_size=shape.sequences,
            num_heads=shape.heads,
            num_gqa_groups=shape.groups,
            max_seqlen_q=shape.longest // 2 if bottom_right else shape.longest,
            max_seqlen_kv=shape.longest,
            num_tokens_q=shape.tokens,
            num_tokens_kv=shape.tokens,
            head_dim_qk=shape.head_dim,
            head_dim_v=shape.head_dim,
            attn_mask_type="padding_causal_bottom_right" if bottom_right else "padding_causal",
            window_size=(-1, 0),
            bottom_right_diagonal=bottom_right,
            core_attention_bias_requires_grad=False,
            pad_between_seqs=shape.padded,
            context_parallel=shape.context > 1,
            cp_comm_type=shape.cp_comm_type,
            cp_size=shape.context,
            cp_size_a2a=shape.context if shape.cp_comm_type == "a2a" else 1,
            deterministic=deterministic or torch.are_deterministic_algorithms_enabled(),
            is_training=True,
            softmax_scale=shape.head_dim**-0.5,
        )
    )
    excluded = tuple(text for text in messages.texts if text.startswith("Disabling"))
    selected = next((text for text in messages.texts if text.startswith("Selected backend")), "")
    if not (flash or fused or unfused):
        return "", excluded
    return selected.removeprefix("Selected backend = ").rstrip("."), excluded


def main() -> None:
    """Answer the question of the command line."""
    asked = json.loads(sys.argv[1])["attention"]
    print(json.dumps(dataclasses.asdict(_answer(None if asked is None else AttentionShape(**asked)))))


if __name__ == "__main__":
    main()
