# SPDX-License-Identifier: Apache-2.0
"""What a plan is held against: the tensors of a real policy on a tiny model, counted by storage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.data.packing import Packer, PackSequence
from megatron_g2rpo.plan.kept import data_parallelism, kept_of_row
from megatron_g2rpo.plan.rows import Row
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.layouts.layout import Layout, layout_of, token_multiples
from megatron_g2rpo.policy.megatron import LossTerms, MegatronPolicy
from megatron_g2rpo.recipe import Recipe
from megatron_g2rpo.types import NO_LABEL, PackedBatch, TokenStats
from tests.common.recipes import G2RPO, SFT
from tests.common.tiny_model import random_inputs, special_tokens

MEGATRON = "policy.megatron_cfg."
REDUCTION = f"{MEGATRON}distributed_data_parallel_config."


def tiny_recipe(directory: Path, *overrides: str, world: int = 1, kind: Any = "sft") -> Recipe:
    """An exemplar with a tiny model; nothing of it is run but the policy.

    Args:
        overrides: ``key=value``.
        world: processes.
        kind: ``sft`` or ``train``.
    """
    exemplar = {"sft": SFT, "train": G2RPO}[kind]
    common = [
        f"policy.model_name={directory}",
        "policy.logprob_chunk_size=16",
        f"cluster.gpus_per_node={world}",
        "cluster.device=cpu",
    ]
    return recipes.load(exemplar, [*common, *overrides], kind)


def policy_of(recipe: Recipe) -> MegatronPolicy:
    return MegatronPolicy(recipe.policy, select("cpu"), seed=0, max_steps=10)


# -- weights, gradients, optimizer ----------------------------------------------------------------------------------


def state_bytes(policy: MegatronPolicy) -> tuple[int, int, int]:
    """Weights, gradients and optimizer state of this rank, after a step; every storage once."""
    assert policy._ddp is not None
    assert policy.optimizer is not None
    weights = _storages(parameter.data for parameter in policy.model.parameters())
    buffers: list[Any] = list(policy._ddp.buffers)  # type: ignore[arg-type]
    gradients = _storages(buffer.grad_data for buffer in buffers)
    states: list[Tensor] = []
    for optimizer in _optimizers(policy.optimizer):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert "exp_avg" in optimizer.state[parameter], "no step was taken"
                states += [value for name, value in optimizer.state[parameter].items() if name != "step"]
                states.append(parameter.data)
                if parameter.grad is not None:
                    gradients.update(_storages([parameter.grad]))
    optimizer_state = {key: size for key, size in _storages(states).items() if key not in weights}
    return sum(weights.values()), sum(gradients.values()), sum(optimizer_state.values())


def _optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    return [inner.optimizer for inner in getattr(optimizer, "chained_optimizers", [optimizer])]


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def shape_of(recipe: Recipe) -> tuple[Layout, Any]:
    """The layout, and how gradients are reduced."""
    layout = layout_of(recipe.policy.megatron_cfg)
    return layout, data_parallelism(recipe, layout)


# -- rows -------------------------------------------------------------------------------------------------------------

Grids = tuple[tuple[tuple[int, int], ...], ...]


def batch_of(
    config: Any, layout: Layout, grids: Grids, text_tokens: int, response_tokens: int, samples: int = 1
) -> PackedBatch:
    """One row: a prompt for each entry of ``grids``, which names the sizes of its images in patches.

    With several samples of a prompt these share it; each has seven tokens less than the one before, but one at least.
    """
    tokens = special_tokens(config.text_config.vocab_size)
    sequence_multiple, row_multiple = token_multiples(layout)
    packer = Packer(
        image_token_id=tokens.image,
        spatial_merge_size=config.vision_config.spatial_merge_size,
        pad_token_id=tokens.pad,
        sequence_multiple=sequence_multiple,
        row_multiple=row_multiple,
        shared_prefix=samples > 1,
    )
    generator = torch.Generator().manual_seed(0)
    sequences = [
        PackSequence(
            inputs=inputs,
            response_ids=torch.randint(tokens.num_text, (max(response_tokens - 7 * sample, 1),), generator=generator),
            advantage=1.0,
        )
        for inputs in random_inputs(config, grids=grids, text_tokens=text_tokens)
        for sample in range(samples)
    ]
    [batch] = packer.pack(sequences, budget=100_000)
    return batch


def row_of(config: Any, batch: PackedBatch) -> Row:
    """What a plan knows of that row."""
    lengths, padded = batch.cu_seqlens.diff().tolist(), batch.cu_seqlens_padded.diff().tolist()
    images = batch.image_grid_thw.prod(1) // config.vision_config.spatial_merge_size**2
    placeholders = int((batch.vision_index >= 0).sum())
    labels = int((batch.labels != NO_LABEL).sum())
    return Row(
        lengths=tuple(lengths),
        padded=tuple(padded),
        parents=tuple(batch.parents.tolist()),
        images=tuple(images.tolist()),
        placeholders=placeholders,
        labels=labels,
    )


def toy_loss(batch: PackedBatch, stats: TokenStats) -> LossTerms:
    terms = -batch.advantages * stats.logprobs + 0.1 * stats.entropy
    return LossTerms(loss=(terms * batch.loss_mask).sum(), num_tokens=batch.num_tokens, sums={})


# -- activations ------------------------------------------------------------------------------------------------------


def kept_bytes(policy: MegatronPolicy, batch: PackedBatch) -> int:
    """What this rank's forward pass in one update leaves allocated for the backward pass, results included."""
    forward, mark = policy.model.forward, "forward pass"

    def marked(*arguments: Any, **keywords: Any) -> Any:
        with record_function(mark):
            return forward(*arguments, **keywords)

    policy.gradients([batch], toy_loss)  # whatever is allocated once
    with patch.object(policy.model, "forward", marked):
        events = _profiled(lambda: policy.gradients([batch], toy_loss))
    [inside] = [event for event in events if event.name() == mark]
    start, end = inside.start_ns(), inside.start_ns() + inside.duration_ns()
    changes = [event.nbytes() for event in events if event.name() == "[memory]" and start <= event.start_ns() <= end]
    assert changes, "the profiler recorded no allocation"
    # Every checkpoint keeps the random state, twice where the CPU stands in for a GPU; a GPU's own has 16 bytes.
    return sum(change for change in changes if abs(change) != torch.get_rng_state().nbytes)


def saved_bytes(policy: MegatronPolicy, batch: PackedBatch) -> int:
    """What autograd saves in this rank's forward pass in one update: every storage once, parameters not.

    For several ranks, where the profiler does not see what communication threads free. It does not see what closures
    hold, as recomputation does.
    """
    parameters = set(_storages(parameter.data for parameter in policy.model.parameters()))
    saved: dict[int, tuple[Any, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in parameters:
            # With the storage itself, so that its address stays its own.
            saved[storage.data_ptr()] = (storage, storage.nbytes())
        return tensor

    forward = policy.model.forward

    def watched(*arguments: Any, **keywords: Any) -> Any:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            return forward(*arguments, **keywords)

    with patch.object(policy.model, "forward", watched):
        policy.gradients([batch], toy_loss)
    return sum(size for _, size in saved.values())


def planned_bytes(recipe: Recipe, hf_config: Any, row: Row) -> int:
    """What a plan says that ``kept_bytes`` is, in one process."""
    # Token ids and labels are the micro-batch's, and were there before.
    return kept_of_row(recipe, hf_config, Layout(), row, 0).total - 2 * 8 * row.tokens


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes that the CPU's allocator held at once for ``run``, beyond those that it held before."""
    events = sorted((event.start_ns(), event.nbytes()) for event in _profiled(run) if event.name() == "[memory]")
    assert events, "the profiler recorded no allocation"
    held = peak = 0
    for _, change in events:
        held += change
        peak = max(peak, held)
    return peak


def _profiled(run: Callable[[], Any]) -> list[Any]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    assert record.profiler is not None
    results: Any = record.profiler.kineto_results
    return results.events()


# -- traffic ----------------------------------------------------------------------------------------------------------


class Wire:
    """Payloads of the collectives that megatron-core and this package call, as bytes that a ring sends.

    Attributes:
        sent: by collective, in the words of ``plan.wire``.
    """

    def __init__(self) -> None:
        self.sent: dict[str, float] = {}

    def add(self, collective: str, sent: float) -> None:
        self.sent[collective] = self.sent.get(collective, 0.0) + sent


@contextmanager
def watched_wire(smallest: int) -> Iterator[Wire]:
    """Count what is sent inside.

    Args:
        smallest: payloads of fewer bytes are the small messages that a plan leaves out.
    """
    import torch.distributed as dist
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.tensor_parallel import layers, mappings

    wire = Wire()

    def ranks(group: Any) -> int:
        return dist.get_world_size(group)

    def count(collective: str, whole: float, group: Any, rounds: int = 1) -> None:
        if whole >= smallest and ranks(group) > 1:
            wire.add(collective, rounds * whole * (ranks(group) - 1) / ranks(group))

    def wrapped(function: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            note(*arguments, **keywords)
            return function(*arguments, **keywords)

        return call

    def all_reduce(tensor: Tensor, op: Any = None, group: Any = None, **_: Any) -> None:
        count("all-reduce", tensor.nbytes, group, rounds=2)

    def gather(output: Tensor, tensor: Tensor, group: Any = None, **_: Any) -> None:
        count("all-gather", output.nbytes, group)

    def scatter(output: Tensor, tensor: Tensor, op: Any = None, group: Any = None, **_: Any) -> None:
        count("reduce-scatter", tensor.nbytes, group)

    def gather_list(tensors: list[Tensor], tensor: Tensor, group: Any = None, **_: Any) -> None:
        count("all-gather", tensor.nbytes * ranks(group), group)

    def broadcast(tensor: Tensor, *_: Any, group: Any = None, **__: Any) -> None:
        count("broadcast", tensor.nbytes, group)

    def point_to_point(operations: list[Any]) -> None:
        for operation in operations:
            if operation.op is dist.isend and operation.tensor.nbytes >= smallest:
                wire.add("send", operation.tensor.nbytes)

    with contextmanagers(
        patch.object(dist, "all_reduce", wrapped(dist.all_reduce, all_reduce)),
        patch.object(dist, "all_gather", wrapped(dist.all_gather, gather_list)),
        patch.object(dist, "broadcast", wrapped(dist.broadcast, broadcast)),
        patch.object(dist, "batch_isend_irecv", wrapped(dist.batch_isend_irecv, point_to_point)),
        *(
            patch.object(module, f"dist_{name}_func", wrapped(getattr(module, f"dist_{name}_func"), note))
            for module in (layers, mappings, param_and_grad_buffer)
            for name, note in (("all_gather", gather), ("reduce_scatter", scatter))
        ),
    ):
        yield wire


@contextmanager
def contextmanagers(*managers: Any) -> Iterator[None]:
    from contextlib import ExitStack

    with ExitStack() as stack:
        for manager in managers:
            stack.enter_context(manager)
        yield
