# SPDX-License-Identifier: Apache-2.0
"""One rank of several: context-parallel attention, FP8 layers with sequence parallelism, FP8 weights from shards.

Started by ``test_te_attention.py``. Every rank computes the whole in plain torch, on its own, and compares
its part.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from tests.gpu import te_attention_checks as attention_checks
from tests.gpu import te_checks as checks
from tests.gpu import te_references as references
from tests.gpu.devices import VIRTUAL

WIDTH, HEADS, GROUPS = attention_checks.WIDTH, 8, 4
# bf16 operands and outputs; a rank's partial outputs are rounded to bf16 before they are merged.
TOLERANCE = 1e-2


def packed_attention(kind: str, *, padding: bool) -> None:
    """Packed sequences whose lengths the ranks share out; with padding, two of three end before their last token."""
    import transformer_engine_torch as tex

    ranks = dist.get_world_size()
    whole = [16 * ranks, 24 * ranks, 8 * ranks]
    lengths = [whole[0] - 3, whole[1] - 1, whole[2]] if padding else whole
    q, k, v, dy = _drawn(sum(whole))
    qs, ks, vs = (each.float().requires_grad_() for each in (q, k, v))
    expected = attention_checks.plain_packed(qs, ks, vs, lengths, whole)
    expected.backward(dy.float())
    cu, cu_padded = attention_checks.offsets(lengths), attention_checks.offsets(whole)
    own = tex.thd_get_partitioned_indices(cu_padded, sum(whole), ranks, dist.get_rank()).long()
    ql, kl, vl = (each[own].clone().requires_grad_() for each in (q, k, v))
    padded = cu_padded if padding else cu
    y = _attention(kind, "thd", "padding_causal")(
        ql,
        kl,
        vl,
        cu_seqlens_q=cu,
        cu_seqlens_kv=cu,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=max(whole),
        max_seqlen_kv=max(whole),
    )
    y.backward(dy[own].view(y.shape))
    of_tokens = expected.detach().abs().sum((1, 2)) > 0
    live = of_tokens[own]
    checks.assert_near(
        [each[live] for each in (y.view(-1, HEADS, WIDTH), ql.grad, kl.grad, vl.grad)],
        [each[own][live] for each in (expected, qs.grad, ks.grad, vs.grad)],
        TOLERANCE,
        ("y", "dq", "dk", "dv"),
    )


def batch_attention(kind: str) -> None:
    """Full causal sequences, [s, b, h, d]; each rank holds two chunks of every one."""
    ranks, rank, length, batch = dist.get_world_size(), dist.get_rank(), 64, 2
    q, k, v, dy = _drawn(length, batch)
    qs, ks, vs = (each.float().requires_grad_() for each in (q, k, v))
    rows = zip(*(each.unbind(1) for each in (qs, ks, vs)), strict=True)
    expected = torch.stack([attention_checks.plain(*row) for row in rows], 1)
    expected.backward(dy.float())
    size = length // (2 * ranks)
    chunks = [torch.arange(chunk * size, (chunk + 1) * size) for chunk in (rank, 2 * ranks - 1 - rank)]
    own = torch.cat(chunks).cuda()
    ql, kl, vl = (each[own].clone().requires_grad_() for each in (q, k, v))
    y = _attention(kind, "sbhd", "causal")(ql, kl, vl)
    y.backward(dy[own].view(y.shape))
    actual = (y.view(-1, batch, HEADS, WIDTH), ql.grad, kl.grad, vl.grad)
    wanted = [each[own] for each in (expected, qs.grad, ks.grad, vs.grad)]
    checks.assert_near(actual, wanted, TOLERANCE, ("y", "dq", "dk", "dv"))


def _drawn(*first: int) -> list[torch.Tensor]:
    shapes = [(*first, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    drawn = [attention_checks.random(*shape, dtype=torch.bfloat16, seed=i) for i, shape in enumerate(shapes)]
    return [each.detach() for each in drawn]


def _attention(kind: str, qkv_format: str, mask: str) -> torch.nn.Module:
    import transformer_engine.pytorch as te

    return te.DotProductAttention(
        HEADS,
        WIDTH,
        num_gqa_groups=GROUPS,
        attention_dropout=0.0,
        qkv_format=qkv_format,
        attn_mask_type=mask,
        cp_group=dist.group.WORLD,
        cp_global_ranks=list(range(dist.get_world_size())),
        cp_stream=torch.cuda.Stream(),
        cp_comm_type=kind,
    )


def sequence_parallel_linear(kind: str) -> None:
    """A column-parallel layer in FP8 gathers its input's rows, scaled by the amax of all ranks.

    Two steps; the ranks' rows differ in size by far. Output and weight gradient are those of the whole input. Delayed
    scales are those of the whole tensors on every rank.
    """
    import transformer_engine.pytorch as te

    ranks, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(5)
    weight = torch.randn(128 * ranks, 256).cuda()
    own = slice(128 * rank, 128 * (rank + 1))
    layer = te.Linear(
        256,
        128 * ranks,
        bias=False,
        params_dtype=torch.bfloat16,
        device="cuda",
        tp_group=dist.group.WORLD,
        tp_size=ranks,
        parallel_mode="column",
        sequence_parallel=True,
    )
    with torch.no_grad():
        layer.weight.copy_(weight[own])
    whole_weight = weight.bfloat16()
    slots = checks.delayed_slots()
    recipe = checks.te_recipe(kind)
    for step in range(2):
        torch.manual_seed(step)
        sizes = 3.0 ** torch.arange(ranks).repeat_interleave(128)
        x = (torch.randn(128 * ranks, 256) * sizes[:, None]).bfloat16().cuda()
        dy = torch.randn(128 * ranks, 128 * ranks).bfloat16().cuda()
        mine = x[own].clone().requires_grad_()
        layer.zero_grad(set_to_none=True)
        with te.autocast(enabled=True, recipe=recipe, amax_reduction_group=dist.group.WORLD):
            y = layer(mine)
        y.backward(dy[:, own].contiguous())
        before = {name: slot.scale.clone() for name, slot in slots.items()}
        if kind == "delayed":
            references.delayed(slots)(x, whole_weight, dy)
            for slot in slots.values():
                slot.end_step()
            scales = {name: float(slot.scale) for name, slot in slots.items()}
            assert checks.layer_scales(layer) == scales, (step, checks.layer_scales(layer), scales)
        scratch = checks.delayed_slots()
        for name, slot in scratch.items():
            slot.scale = before[name]
        expected = references.linear(
            checks.rounding_of(kind, scratch), x, whole_weight[own], None, dy[:, own].contiguous()
        )
        tolerance = checks.within(checks.FP8_TOLERANCE[kind, torch.bfloat16], checks.FP8_ON_A_GPU)
        names = [f"{name} of step {step}" for name in ("y", "dw")]
        checks.assert_near((y, layer.weight.grad), (expected.y, expected.dw), tolerance, names)


def weights_from_shards(kind: str) -> None:
    """FP8 weights take the flat shards of an fp32 master that the ranks hold, scaled by the amaxes of the whole.

    ``kind`` is "current" or "blockwise". The last rank's shard is far larger than the others'.
    """
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch.tensor.utils import quantize_master_weights

    ranks, rank = dist.get_world_size(), dist.get_rank()
    with te.quantized_model_init(enabled=True, recipe=checks.te_recipe(kind)):
        layer = te.Linear(256, 96 * ranks, bias=False, params_dtype=torch.bfloat16, device="cuda")
    torch.manual_seed(8)
    sizes = 3.0 ** torch.arange(ranks).repeat_interleave(96)
    master = torch.randn(96 * ranks, 256) * sizes[:, None]
    length = 96 * 256
    own = slice(rank * length, (rank + 1) * length)
    shard = master.view(-1)[own].clone().cuda()
    quantize_master_weights([layer.weight], [shard], [rank * length], dist.group.WORLD)
    cast = master.bfloat16()  # Transformer Engine casts a master to the weight's own type before
    whole = references.tiles(cast) if kind == "blockwise" else references.tensorwise(cast, references.E4M3)
    actual = layer.weight.dequantize().view(-1)[own]
    tolerance = checks.FP8_TOLERANCE[kind, torch.bfloat16]
    checks.assert_near([actual], [whole.bfloat16().view(-1)[own]], tolerance, ["weight"])


def cases() -> dict[str, Callable[[], None]]:
    """Return every case by its name."""
    found: dict[str, Callable[[], None]] = {}
    for kind in ("p2p", "all_gather", "a2a"):
        found[f"{kind}, packed"] = partial(packed_attention, kind, padding=False)
        found[f"{kind}, packed and padded"] = partial(packed_attention, kind, padding=True)
        found[f"{kind}, batch"] = partial(batch_attention, kind)
    for kind in checks.RECIPES:
        found[f"{kind}, sequence parallel"] = partial(sequence_parallel_linear, kind)
    for kind in ("current", "blockwise"):
        found[f"{kind}, weights from shards"] = partial(weights_from_shards, kind)
    return found


def faults() -> dict[str, tuple[Any, str, Any, Callable[[], None]]]:
    """Return what to replace in the emulation, and by what, with the case that has to fail then on every rank."""
    from tests.gpu.te_emulation import context_parallel, quantize

    half = context_parallel._half
    return {
        "amax of this rank only": (
            quantize,
            "reduce_amax",
            lambda amax, group: None,
            partial(sequence_parallel_linear, "current"),
        ),
        "halves exchanged": (
            context_parallel,
            "_half",
            lambda cu_seqlens, *, second: half(cu_seqlens, second=not second),
            partial(packed_attention, "p2p", padding=False),
        ),
    }


def failure(case: Callable[[], None]) -> str | None:
    """Return how a case fails, or None."""
    try:
        case()
    except AssertionError as error:
        return str(error)
    return None


def main() -> None:
    """Run every case, and each fault's, and say which do not behave."""
    import transformer_engine.pytorch  # noqa: F401  (it loads the extension)

    faulthandler.dump_traceback_later(300, exit=True)
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    wrong = [f"{name}: {why}" for name, case in cases().items() if (why := failure(case))]
    if VIRTUAL:
        for name, (module, function, fault, case) in faults().items():
            real = getattr(module, function)
            setattr(module, function, fault)
            if failure(case) is None:
                wrong.append(f"the fault '{name}' is not seen")
            setattr(module, function, real)
    dist.barrier()
    dist.destroy_process_group()
    assert not wrong, f"rank {os.environ['RANK']}: " + "\n".join(wrong)
    print("every case holds", flush=True)


if __name__ == "__main__":
    main()
