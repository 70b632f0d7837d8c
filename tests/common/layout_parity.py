# SPDX-License-Identifier: Apache-2.0
"""The parity check: the Megatron policy at any layout against one transformers process on unpacked inputs.

One ``Case`` is a layout with its switches. For it, ``check_layout_parity`` compares log-probabilities and entropies of
every response, loss, entropy of every task, gradient norm, every gradient by Hugging Face name, and the weights after
three optimizer steps with a ``Reference``: transformers' forward and autograd, one sequence at a time, and torch's
AdamW. Errors are

- of log-probabilities and entropies: the largest difference, nats; relative to values above one;
- of scalars: relative to the reference;
- of gradients: ``||ours - theirs|| / ||theirs||``, tensor by tensor;
- of updates: ``||ours - theirs|| / ||theirs - initial||``, tensor by tensor.

Used in one process by the unit tests and in several by ``tests/parallel``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from megatron_g2rpo.data.packing import PackSequence, response_values
from megatron_g2rpo.policy import optimizer
from megatron_g2rpo.policy.device import Device
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.recipe import Optimizer, Policy
from megatron_g2rpo.types import PackedBatch
from tests.common.compare import Report, largest_error, relative_distance
from tests.common.hardware import layer_overrides, layers_of
from tests.common.parity import (
    LOGPROB_TOLERANCE,
    TEMPERATURE,
    Values,
    packer_for,
    parity_sequences,
    rows_of,
    sequences_by_rank,
    toy_loss,
    transformers_values,
)
from tests.common.policy_layout import layout_options
from tests.common.tiny_model import make_tiny_qwen3vl

# Largest errors, by precision and kind; see the module's docstring for what each is relative to.
TOLERANCES: dict[str, dict[str, float]] = {
    "float32": {
        "logprob": LOGPROB_TOLERANCE,
        "entropy": LOGPROB_TOLERANCE,
        "loss": 1e-5,
        "task_entropy": 1e-5,
        "grad_norm": 1e-5,
        "gradient": 1e-5,
        "update": 1e-3,
        "later_logprob": 1e-4,
    },
    # bf16 rounds to 1 part in 256 and more than half of that remains of any two of its computations that add up in
    # another order: transformers' own gradients are 2e-2 (norms of queries and keys: 1e-1) away from those that fp32
    # computes with the same weights, and ours are as far. What must not be is that we are farther from them than
    # transformers: "share" is the ratio of the two distances, for a tensor and for the whole gradient, for all
    # log-probabilities and for all entropies; the later ones are compared with fp32 computations of the same training.
    # The ratio is itself a draw: over two models, two seeds and both devices, 8 ranks in TP 2 x PP 2 x CP 2 had 0.72 to
    # 1.28 for entropies, 0.86 to 1.19 for log-probabilities. The absolute ones are bounds that a mistake would break
    # by far: the largest seen were 5.2e-2 of an entropy and 1.4e-2 of a task's (8 ranks, shares below 1), and 2.2e-1 of
    # a log-probability after the training of eight layers (share 1.3). Of one tensor's gradient the largest share was
    # 2.51 (a bias of 32 numbers), in rows with shared prompts: there the gradients of a prompt's keys and values, one
    # for each response, add up in bfloat16.
    "bfloat16": {
        "logprob": 5e-2,
        "logprob_share": 1.5,
        "entropy": 8e-2,
        "entropy_share": 1.5,
        "loss": 1e-2,
        "task_entropy": 2e-2,
        "grad_norm": 1e-2,
        "gradient": 1e-1,
        "gradient_share": 3.0,
        "whole_gradient": 4e-2,
        "whole_share": 1.25,
        "later_logprob": 3e-1,
        "later_share": 2.0,  # Adam's first steps have the size of the learning rate, however small the gradient
    },
}
# Transformer Engine's layers round elsewhere than transformers: RMSNorm multiplies by its weight in fp32 and rounds
# once, where transformers (and the local layers) round before as well, and its attention keeps probabilities in fp32.
# The two are then as far apart as both errors together, so its values are held against fp32's, not transformers'.
# (One of transformers' own entropies is 7e-2 from fp32's.)
TOLERANCES["transformer_engine"] = {**TOLERANCES["bfloat16"], "entropy": 1e-1}

SHAPES: dict[str, dict[str, Any]] = {
    "tied": {"layers": 4},
    "untied": {"layers": 3, "tied": False, "vocab": 161, "heads": 4, "kv_heads": 4, "deepstack": (1,)},
    "wide": {"layers": 5, "hidden": 96, "heads": 6, "kv_heads": 2, "head_dim": 24, "intermediate": 128},
    "one_kv_head": {"layers": 4, "kv_heads": 1, "tied": False},
    "deep": {"layers": 8},
}
# Gradients that are zero but for rounding (of the vision tower's key biases, say: softmax does not see them) would be
# made full steps by a smaller one. Those that count are 1e-3 after clipping.
ADAM_EPS = 1e-6
# Small enough for several buckets a stage: overlapped reductions start in an order that depends on the rows' images.
OVERLAP_BUCKET = 20_000
STEPS = 3
MODEL_SEED = 1


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout, its switches, and the model that it is tried on; data parallelism takes the rest of the world.

    Attributes:
        shape: name of the model's shape, a key of ``SHAPES``.
        overlap: gradient reduction overlaps the backward pass; with the distributed optimizer, the gather of updated
            weights the next forward pass as well.
        recompute: recompute granularity, and for ``full`` the method and the number of layers.
        stages: number of layers of the first and of the last pipeline stage.
        impl: layers and core attention, see ``hardware.layer_overrides``.
        cp_comm: how Transformer Engine's attention exchanges keys.
        fusions: keys of ``megatron_cfg`` to set to true.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    shape: str = "tied"
    precision: str = "float32"
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    overlap: bool = False
    recompute: tuple[str, str, int] | tuple[str] | None = None
    stages: tuple[int | None, int | None] = (None, None)
    freeze_vision: bool = False
    impl: str = "auto"
    cp_comm: str = "p2p"
    fusions: tuple[str, ...] = ()

    def __str__(self) -> str:
        first, last = self.stages
        words = [
            f"tp{self.tensor} pp{self.pipeline} cp{self.context}",
            "sp" if self.sequence_parallel else "",
            "distopt" if self.distributed_optimizer else "",
            "overlap" if self.overlap else "",
            "-".join(["recompute", *map(str, self.recompute)]) if self.recompute else "",
            f"stages {first or ''}..{last or ''}" if first or last else "",
            self.shape,
            "frozen-vision" if self.freeze_vision else "",
            "" if self.precision == "float32" else self.precision,
            "" if self.impl == "auto" else self.impl,
            "" if self.cp_comm == "p2p" else self.cp_comm,
            *self.fusions,
        ]
        return " ".join(word for word in words if word)

    @property
    def tolerances(self) -> dict[str, float]:
        """The largest error of each kind, see ``TOLERANCES``."""
        rounds_elsewhere = self.precision == "bfloat16" and layers_of(self.impl) == "transformer_engine"
        return TOLERANCES["transformer_engine" if rounds_elsewhere else self.precision]

    def reference(self, directory: Path) -> Path:
        """Return the path of the file that holds the case's reference."""
        frozen = "_frozen" if self.freeze_vision else ""
        return directory / self.shape / f"reference_{self.precision}{frozen}.pt"

    def section(self, directory: Path, *overrides: str) -> Policy:
        """Return the recipe's ``policy`` section for the case, with the model under ``directory``."""
        granularity, *rest = self.recompute or (None,)
        method, layers = rest or ("uniform", 1)
        overlap = {True: "distributed-overlap-gather", False: "overlap"}[self.distributed_optimizer]
        plain = {True: "distributed", False: "plain"}[self.distributed_optimizer]
        return layout_options(
            directory / self.shape,
            f"megatron_cfg.optimizer.adam_eps={ADAM_EPS}",
            *overrides,
            tp=self.tensor,
            pp=self.pipeline,
            cp=self.context,
            mode=overlap if self.overlap else plain,
            precision=self.precision,
            sequence_parallel=self.sequence_parallel,
            num_layers_in_first_pipeline_stage=self.stages[0],
            num_layers_in_last_pipeline_stage=self.stages[1],
            recompute_granularity=granularity,
            recompute_method=method,
            recompute_num_layers=layers,
            freeze_vision=self.freeze_vision,
            cp_comm_type=self.cp_comm,
            **layer_overrides(self.impl, self.precision),
            **dict.fromkeys(self.fusions, True),
        )


# -- what transformers says ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """The values of transformers that a case is compared with.

    Attributes:
        first: values before any update.
        exact: values of the same weights computed in float32; equal to ``first`` for a float32 model.
        initial, trained: float32 weights by name, before the updates and after ``STEPS`` updates.
        last: log-probabilities after ``STEPS`` updates.
        exact_last: the same where every gradient was computed in float32, from weights rounded after every update;
            equal to ``last`` for a float32 model.
    """

    first: Values
    exact: Values
    initial: dict[str, Tensor]
    trained: dict[str, Tensor]
    last: list[Tensor]
    exact_last: list[Tensor]


def prepare(directory: Path, case: Case) -> None:
    """Write the model of a case under ``directory``, and its reference, unless they are there."""
    target = case.reference(directory)
    if target.exists():
        return
    config, model = make_tiny_qwen3vl(directory / case.shape, **SHAPES[case.shape], seed=MODEL_SEED)
    sequences = parity_sequences(config)
    model.model.visual.requires_grad_(not case.freeze_vision)
    rounded = None
    if case.precision == "float32":
        first = exact = transformers_values(model, sequences)
    else:
        # Loaded, not cast: `.to(bfloat16)` would round the rotary tables.
        model = Qwen3VLForConditionalGeneration.from_pretrained(directory / case.shape, dtype=torch.bfloat16)
        first = transformers_values(model, sequences)
        rounded = Qwen3VLForConditionalGeneration.from_pretrained(directory / case.shape, dtype=torch.float32)
        rounded.model.visual.requires_grad_(not case.freeze_vision)
        with torch.no_grad():
            for parameter in rounded.parameters():
                parameter.copy_(parameter.bfloat16())
        exact = transformers_values(rounded, sequences)
    settings = case.section(directory).megatron_cfg.optimizer
    # Pretrained weights as the optimizer sees them: bf16 models have main copies, made from rounded weights.
    initial = {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}
    main, last = _train(model, initial, sequences, settings, model.dtype)
    exact_last = last if rounded is None else _train(rounded, initial, sequences, settings, model.dtype)[1]
    torch.save(Reference(first, exact, initial, main, last, exact_last), target)


def _train(
    model: Any, initial: dict[str, Tensor], sequences: Sequence[PackSequence], settings: Optimizer, dtype: torch.dtype
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Train a copy of ``initial`` with ``STEPS`` steps of torch's AdamW, as the optimizer section says.

    The model has its values, rounded to ``dtype``, at every step; the last of them and its log-probabilities then are
    returned.
    """
    main = {name: tensor.clone() for name, tensor in initial.items()}
    # megatron-core's standard: no weight decay on biases and norms.
    learning = [main[name] for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [tensor for tensor in learning if tensor.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [tensor for tensor in learning if tensor.ndim == 1], "weight_decay": 0.0},
    ]
    betas = (settings.adam_beta1, settings.adam_beta2)
    adam = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.adam_eps)
    for _ in range(STEPS):
        values = transformers_values(model, sequences)
        for name, gradient in values.gradients.items():
            main[name].grad = gradient
        torch.nn.utils.clip_grad_norm_(learning, settings.clip_grad)
        adam.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(main[name].to(dtype))
    for tensor in learning:
        tensor.grad = None
    return main, transformers_values(model, sequences).logprobs


# -- the comparison -----------------------------------------------------------------------------------------------


def check_layout_parity(directory: Path, device: Device, case: Case) -> Report:
    """Compare one case with its reference, which ``prepare`` has written. A collective of the world.

    Returns:
        On every rank, the report of the errors of all ranks.
    """
    expected: Reference = torch.load(case.reference(directory), weights_only=False)
    buckets = {"bucket_size": OVERLAP_BUCKET} if case.overlap else {}
    with patch.object(optimizer, "DistributedDataParallelConfig", partial(DistributedDataParallelConfig, **buckets)):
        policy = MegatronPolicy(case.section(directory), device, seed=0, max_steps=STEPS)
    sequences = parity_sequences(policy.hf_config)
    groups = policy.groups
    splits = [sequences_by_rank(len(sequences), groups.data_size, idle=idle) for idle in (False, True)]
    # Every sequence with its own prompt, and with the prompt that those of a group share.
    (uneven, idle), (shared, shared_idle) = (
        [rows_of(packer, sequences, split, groups.data_rank) for split in splits]
        for packer in (packer_for(policy.hf_config, policy.layout, shared_prefix=on) for on in (False, True))
    )
    assert groups.data_rank < groups.data_size - 1 or max(int(row.parents.max()) for row in shared_idle) >= 0
    mine = splits[0][groups.data_rank]

    report = Report(case.tolerances)
    for rows in (uneven, shared):
        _compare_logprobs(report, policy, rows, mine, expected)
        policy.gradients(rows, toy_loss, TEMPERATURE)
        _compare_gradients(report, policy, expected)
    for step, batches in enumerate((idle if case.freeze_vision else shared_idle, uneven, shared)):
        metrics = policy.update(batches, toy_loss, TEMPERATURE)
        if step == 0:
            _compare_metrics(report, metrics, _nearest(policy, expected))
    if case.precision == "float32":
        _compare_weights(report, policy, expected)
    after = dict(_responses(uneven, [stats.logprobs for stats in policy.logprobs(uneven, TEMPERATURE)]))
    engine = _nearest(policy, expected) is expected.exact
    _compare_responses(report, "later_logprob", after, expected.exact_last if engine else expected.last)
    _note_share(report, "later_share", after, expected.last, expected.exact_last)
    _release(policy)
    return report.over_all_ranks()


def _release(policy: MegatronPolicy) -> None:
    """Let the policy be collected, and its process groups with it.

    The distributed optimizer's float32 shares are views of the weights: the autograd graph links them to hooks of DDP,
    DDP's config to the optimizer, and the optimizer to its shares. Python's collector does not see the graph's part.
    """
    policy.config.grad_scale_func = policy.config.no_sync_func = policy.config.grad_sync_func = None


def _nearest(policy: MegatronPolicy, expected: Reference) -> Values:
    """What the policy's values are held against: transformers' own, or float32's; see ``TOLERANCES``."""
    return expected.exact if policy.kernels.layers == "transformer_engine" else expected.first


def _compare_logprobs(
    report: Report, policy: MegatronPolicy, batches: list[PackedBatch], mine: list[int], expected: Reference
) -> None:
    stats, nearest = policy.logprobs(batches, TEMPERATURE), _nearest(policy, expected)
    logprobs = dict(_responses(batches, [stat.logprobs for stat in stats]))
    entropies = dict(_responses(batches, [stat.entropy for stat in stats]))
    assert sorted(logprobs) == mine, (sorted(logprobs), mine)
    _compare_responses(report, "logprob", logprobs, nearest.logprobs)
    _compare_responses(report, "entropy", entropies, nearest.entropies)
    _note_share(report, "logprob_share", logprobs, expected.first.logprobs, expected.exact.logprobs)
    _note_share(report, "entropy_share", entropies, expected.first.entropies, expected.exact.entropies)


def _compare_responses(report: Report, kind: str, ours: dict[int, Tensor], expected: list[Tensor]) -> None:
    for index, values in ours.items():
        report.note(kind, largest_error(values, expected[index]), f"sequence {index}")


def _note_share(report: Report, kind: str, ours: dict[int, Tensor], theirs: list[Tensor], exact: list[Tensor]) -> None:
    """Note ``||ours - exact|| / ||theirs - exact||`` over all responses of all ranks. A collective of the world."""
    if kind not in report.tolerances:  # in float32 theirs are the exact ones
        return
    squares = {
        index: (float((values - exact[index]).square().sum()), float((theirs[index] - exact[index]).square().sum()))
        for index, values in ours.items()
    }
    own, other = zip(
        *{index: pair for rank in _gathered(squares) for index, pair in rank.items()}.values(), strict=True
    )
    report.note(kind, math.sqrt(sum(own) / sum(other)))


def _responses(batches: list[PackedBatch], values: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield the index and the values of every response."""
    for batch, value in zip(batches, values, strict=True):
        yield from response_values(batch, value).items()


def _compare_metrics(report: Report, metrics: dict[str, float], expected: Values) -> None:
    report.note("loss", abs(metrics["loss"] / expected.loss - 1))
    # A parameter that megatron-core does not know as sharded or shared would be counted once too few or too often.
    report.note("grad_norm", abs(metrics["grad_norm"] / expected.grad_norm - 1))
    for task, entropy in enumerate(expected.task_entropy):
        mean = metrics[f"entropy_{task}"] / metrics[f"tokens_{task}"]
        report.note("task_entropy", abs(mean / entropy - 1), f"task {task}")
    others = _gathered(metrics)
    assert all(other == metrics for other in others), f"ranks disagree on the metrics: {others}"


def _compare_gradients(report: Report, policy: MegatronPolicy, expected: Reference) -> None:
    assert policy._ddp is not None
    optimizer.gather_gradients(policy._ddp)
    theirs, exact = expected.first.gradients, expected.exact.gradients
    frozen = expected.initial.keys() - theirs.keys()
    ours = {
        name: gradient.float().cpu()
        for name, gradient in policy.stream(lambda weight: weight.main_grad if weight.requires_grad else weight.data)
        if name not in frozen
    }
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    nearest = _nearest(policy, expected).gradients
    for name, gradient in ours.items():
        report.note("gradient", relative_distance(gradient, nearest[name]), name)
    if theirs is exact:
        return
    for name, gradient in ours.items():
        report.note(
            "gradient_share", float((gradient - exact[name]).norm() / (theirs[name] - exact[name]).norm()), name
        )
    whole, their_whole, exact_whole = (torch.cat([g[name].flatten() for name in ours]) for g in (ours, theirs, exact))
    report.note("whole_gradient", relative_distance(whole, exact_whole if nearest is exact else their_whole))
    report.note("whole_share", float((whole - exact_whole).norm() / (their_whole - exact_whole).norm()))


def _compare_weights(report: Report, policy: MegatronPolicy, expected: Reference) -> None:
    for name, weight in policy.stream():
        # A frozen weight takes no step, and any difference is an error.
        step = expected.trained[name] - expected.initial[name]
        report.note("update", relative_distance(weight, expected.trained[name], step), name)
    tied = policy.model.share_embeddings_and_output_weights and policy.groups.pipeline_size > 1
    if tied and (policy.groups.is_first_stage or policy.groups.is_last_stage):
        group = policy.groups.collection.embd
        weight = policy.model.shared_embedding_or_output_weight()
        assert weight is not None
        copies = [torch.empty_like(weight) for _ in range(group.size())]
        dist.all_gather(copies, weight.detach(), group=group)
        assert torch.equal(*copies), "the two copies of the tied weight have parted"


def _gathered(value: Any) -> list[Any]:
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
