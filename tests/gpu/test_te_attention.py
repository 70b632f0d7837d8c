# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine's attention and fused rotation against plain torch, and which backend it selects for what."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.gpu import te_attention_checks as checks
from tests.gpu.devices import needs_cuda, needs_transformer_engine, needs_virtual

pytestmark = [needs_cuda, needs_transformer_engine]
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let Transformer Engine select its unfused backend; it keeps a selection until it is told to look again."""
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention

    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    dot_product_attention._attention_backends["backend_selection_requires_update"] = True
    yield
    dot_product_attention._attention_backends["backend_selection_requires_update"] = True


@pytest.mark.parametrize("padded", [False, True], ids=["tight", "padded"])
def test_packed_sequences_attend_to_themselves_only(padded: bool) -> None:
    checks.check_packed(BF16, padded=padded)


def test_packed_sequences_in_fp32_without_padding() -> None:
    checks.check_packed(FP32, padded=False)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_the_scale_of_the_softmax_is_the_one_asked_for(dtype: torch.dtype) -> None:
    checks.check_packed(dtype, padded=False, scale=0.3)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("mask", "qkv_format"), [("causal", "sbhd"), ("no_mask", "sbhd"), ("causal", "bshd")])
def test_a_batch_of_full_sequences(mask: str, qkv_format: str, dtype: torch.dtype) -> None:
    checks.check_batch(dtype, mask, qkv_format)


@pytest.mark.parametrize(("mask", "qkv_format"), [("causal", "sbhd"), ("no_mask", "bshd")])
def test_the_unfused_backend_on_a_batch(mask: str, qkv_format: str, unfused: None) -> None:
    checks.check_batch(BF16, mask, qkv_format)
    assert checks.selected() == "unfused"


def test_the_unfused_backend_on_packed_sequences(unfused: None) -> None:
    checks.check_packed(BF16, padded=False)
    assert checks.selected() == "unfused"


def test_dropout_follows_the_generator_and_is_the_same_in_both_passes() -> None:
    checks.check_dropout()


@needs_virtual
@pytest.mark.parametrize(
    ("check", "backend"),
    [
        (lambda: checks.check_packed(BF16, padded=False), "fused"),
        (lambda: checks.check_packed(BF16, padded=True), "fused"),
        (lambda: checks.check_batch(BF16, "causal"), "fused"),
        (lambda: checks.check_packed(FP32, padded=False), "unfused"),
        (lambda: checks.check_batch(FP32, "causal"), "unfused"),
    ],
    ids=["bf16 packed", "bf16 padded", "bf16 batch", "fp32 packed", "fp32 batch"],
)
def test_the_backend_that_is_selected_without_flash_attention(check: Any, backend: str) -> None:
    check()
    assert checks.selected() == backend


def test_fp32_with_padding_between_sequences_has_no_backend() -> None:
    """On a GPU as well: the fused kernels take bf16 and fp16, the unfused path no padding between sequences."""
    with pytest.raises(ValueError, match="No dot product attention"):
        checks.check_packed(FP32, padded=True)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_the_fused_rotation_is_megatron_cores_unfused_one(dtype: torch.dtype) -> None:
    checks.check_rotation(dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_the_fused_rotation_of_packed_sequences_too(dtype: torch.dtype) -> None:
    checks.check_packed_rotation(dtype)


def test_angles_for_each_sequence_of_a_batch_are_refused() -> None:
    """The kernel has one table of angles for all sequences."""
    from megatron.core.extensions.transformer_engine import fused_apply_rotary_pos_emb

    x, angles = (checks.random(8, 2, heads, 16, dtype=FP32, seed=heads).detach() for heads in (4, 1))
    with pytest.raises(RuntimeError, match="freqs"):
        fused_apply_rotary_pos_emb(x, angles)


def test_parts_of_an_attention_merge_into_the_whole() -> None:
    checks.check_merging()


def test_halves_of_packed_gradients_are_added_copied_and_cleared() -> None:
    import transformer_engine.pytorch  # noqa: F401  (it loads the extension)
    import transformer_engine_torch as tex

    cu_seqlens = checks.offsets((2, 4))
    step = torch.arange(1.0, 7.0, device="cuda").view(6, 1, 1)
    expected = {
        ("add", "copy"): [11, 2, 13, 14, 5, 6],
        ("copy", "add"): [1, 12, 3, 4, 15, 16],
        ("none", "add"): [10, 11, 10, 10, 12, 13],
        ("add", "none"): [11, 10, 12, 13, 10, 10],
        ("copy", "none"): [1, 10, 2, 3, 10, 10],
        ("none", "copy"): [10, 1, 10, 10, 2, 3],
    }
    for (first, second), values in expected.items():
        grad = torch.full((6, 1, 1), 10.0, device="cuda")
        part = step if {first, second} == {"add", "copy"} else step[:3].contiguous()
        tex.thd_grad_correction(grad, part, cu_seqlens, first, second)
        assert grad.flatten().tolist() == values, (first, second)
    halves = [tex.thd_read_half_tensor(step, cu_seqlens, half).flatten().tolist() for half in (0, 1)]
    assert halves == [[1, 3, 4], [2, 5, 6]]


def test_a_rank_holds_two_chunks_of_each_sequence() -> None:
    """Of 8 and 16 tokens over 2 ranks: rank 0 has the first and the last quarter, rank 1 the two between."""
    import transformer_engine.pytorch  # noqa: F401  (it loads the extension)
    import transformer_engine_torch as tex

    cu_seqlens = checks.offsets((8, 16))
    expected = [[0, 1, 6, 7, 8, 9, 10, 11, 20, 21, 22, 23], [2, 3, 4, 5, *range(12, 20)]]
    for rank in (0, 1):
        assert tex.thd_get_partitioned_indices(cu_seqlens, 24, 2, rank).tolist() == expected[rank]
    row = torch.arange(24.0, device="cuda")[:, None]
    by_rank = tex.thd_sequence_order_to_cp_rank_order(row, cu_seqlens, 2, 24)
    assert by_rank.flatten().tolist() == expected[0] + expected[1]
    assert torch.equal(tex.thd_cp_rank_order_to_sequence_order(by_rank, cu_seqlens, 2, 24), row)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.full)])
def test_ranks_together_compute_what_one_does(ranks: int) -> None:
    """Context parallelism by p2p, all_gather and a2a; FP8 with sequence parallelism: see the worker."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} devices")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    worker = [*command, "-m", "tests.gpu.te_parallel_worker"]
    done = subprocess.run(worker, capture_output=True, text=True, env=dict(os.environ), timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert done.stdout.count("every case holds") == ranks, done.stdout[-6000:]
