# SPDX-License-Identifier: Apache-2.0
"""One of four ranks of the weights test: every layout in one launch, on modules that are weights and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_g2rpo import weights
from megatron_g2rpo.weights.table import UnmappedParameter
from tests.common.launch import report_result
from tests.common.tiny_model import make_tiny_qwen3vl, table_for
from tests.unit.weights.plain import OUTPUT, plain_stage

EMBEDDING = "model.language_model.embed_tokens.weight"
FIRST_NORM = "model.language_model.layers.0.input_layernorm.weight"
LAST_NORM = "model.language_model.norm.weight"
# Layers of every stage, tensor-parallel ranks. Uneven stages; a stage of each kind; fewer key/value groups (2) than
# tensor-parallel ranks.
LAYOUTS = (((1, 2), 2), ((2, 1, 1, 1), 1), ((3,), 4))


@dataclass(frozen=True)
class Replica:
    """Where this rank stands; tensor-parallel ranks are neighbours, as megatron-core numbers them."""

    stage_layers: tuple[int, ...]
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup

    @property
    def stage(self) -> int:
        return dist.get_rank(self.pipeline_group)

    @property
    def tensor_rank(self) -> int:
        return dist.get_rank(self.tensor_group)

    @property
    def tensor_size(self) -> int:
        return dist.get_world_size(self.tensor_group)

    @property
    def layer_offset(self) -> int:
        return sum(self.stage_layers[: self.stage])

    def build(self, table: weights.WeightTable, tensors: Mapping[str, Tensor]) -> nn.Module:
        return plain_stage(
            table,
            tensors,
            tensor_size=self.tensor_size,
            stage_layers=self.stage_layers,
            stage=self.stage,
            transformer_engine=self.stage % 2 == 1,  # both spellings of the norms in one model
        )

    def load(self, model: nn.Module, table: weights.WeightTable, tensors: Mapping[str, Tensor]) -> None:
        weights.load(
            model,
            table,
            tensors,
            tensor_rank=self.tensor_rank,
            tensor_size=self.tensor_size,
            source="a test",
            pipeline_group=self.pipeline_group,
            layer_offset=self.layer_offset,
        )

    def stream(self, model: nn.Module, table: weights.WeightTable, **keywords) -> Iterator[tuple[str, Tensor]]:
        groups = {"tensor_group": self.tensor_group, "pipeline_group": self.pipeline_group}
        return weights.stream(model, table, **groups, layer_offset=self.layer_offset, **keywords)


def replica(stage_layers: tuple[int, ...], tensor_size: int) -> Replica:
    """The groups of this rank; a collective of all ranks, which take part in the making of every group."""
    mine: list[dist.ProcessGroup] = []
    ranks = torch.arange(dist.get_world_size()).reshape(len(stage_layers), tensor_size)
    for members in (ranks, ranks.T):
        for row in members.tolist():
            group = dist.new_group(row)
            if dist.get_rank() in row:
                mine.append(group)
    return Replica(stage_layers, *mine)


def check_equal_to_one_process(place: Replica, table: weights.WeightTable, tensors: dict[str, Tensor]) -> None:
    whole = plain_stage(table, tensors, stage_layers=(sum(place.stage_layers),))
    weights.load(whole, table, tensors, tensor_rank=0, tensor_size=1, source="a test")
    expected = dict(weights.stream(whole, table, tensor_group=None))

    model = place.build(table, tensors)
    place.load(model, table, tensors)
    streamed = [(name, tensor.clone()) for name, tensor in place.stream(model, table)]
    assert sorted(name for name, _ in streamed) == sorted(expected), "every tensor, and once"
    layers = [int(found[1]) for name, _ in streamed if (found := re.search(r"language_model\.layers\.(\d+)\.", name))]
    assert layers == sorted(layers), "stages in order"
    for name, tensor in streamed:
        assert torch.equal(tensor, expected[name]), name
        assert torch.equal(tensor, tensors[name]), name

    # Gradients: other values, and another dtype than the parameters'.
    for parameter in model.parameters():
        parameter.main_grad = parameter.data.double() * 2
    gradients = dict(place.stream(model, table, tensor_of=lambda parameter: parameter.main_grad))
    assert gradients.keys() == expected.keys()
    for name, theirs in expected.items():
        assert gradients[name].dtype == torch.float64
        assert torch.equal(gradients[name], theirs.double() * 2), name


def check_tied_copy(place: Replica, table: weights.WeightTable, tensors: dict[str, Tensor]) -> None:
    """The last stage's output matrix holds the embedding; what is streamed is the first stage's."""
    model = place.build(table, tensors)
    place.load(model, table, tensors)
    named = dict(model.named_parameters())
    if len(place.stage_layers) > 1 and place.stage == len(place.stage_layers) - 1:
        rows = -(-len(tensors[EMBEDDING]) // place.tensor_size)
        expected = tensors[EMBEDDING][place.tensor_rank * rows : (place.tensor_rank + 1) * rows]
        assert torch.equal(named[OUTPUT][: len(expected)], expected)
        named[OUTPUT].data.zero_()
    assert torch.equal(dict(place.stream(model, table))[EMBEDDING], tensors[EMBEDDING])


def check_lazy(place: Replica, table: weights.WeightTable, tensors: dict[str, Tensor]) -> None:
    """Nothing is read of a parameter before its turn, but its dtype."""
    model = place.build(table, tensors)
    parameters, calls = len(list(model.parameters())), 0

    def tensor_of(parameter: nn.Parameter) -> Tensor:
        nonlocal calls
        calls += 1
        return parameter.data

    iterator = place.stream(model, table, tensor_of=tensor_of)
    assert calls == 0
    next(iterator)
    assert calls == parameters + (place.stage == 0)
    for _ in iterator:
        pass
    assert calls <= 2 * parameters


def check_errors_reach_every_rank(place: Replica, table: weights.WeightTable, tensors: dict[str, Tensor]) -> None:
    for change, message in (
        ({name: tensor for name, tensor in tensors.items() if name != LAST_NORM}, f"missing: {LAST_NORM}"),
        ({**tensors, FIRST_NORM: torch.zeros(3)}, f"shape (3,) instead of (64,): {FIRST_NORM}"),
        ({**tensors, "model.extra": torch.zeros(3)}, "in 1 places:\n  fits no parameter: model.extra"),
    ):
        error = error_of(lambda change=change: place.load(place.build(table, tensors), table, change))
        assert isinstance(error, weights.CheckpointError), repr(error)
        assert message in str(error), error

    stages = len(place.stage_layers)
    without = weights.WeightTable([row for row in table.rows if "final_layernorm" not in row.megatron], table.ignored)
    model = place.build(table, tensors)
    for use in (lambda: place.load(model, without, tensors), lambda: list(place.stream(model, without))):
        error = error_of(use)
        assert isinstance(error, UnmappedParameter), repr(error)
        assert "language_model.decoder.final_layernorm.weight" in str(error), error

    # A reader's error may be of any class, also of one that cannot be pickled.
    error = error_of(lambda: place.load(model, table, Unreadable(tensors)))
    assert isinstance(error, Broken if place.stage == stages - 1 else RuntimeError), repr(error)
    assert f"cannot read {LAST_NORM}" in str(error), error

    if stages > 1:
        # Without an offset, two stages say that they hold layer 0: exports would lack the later one.
        wrong = replace(place, stage_layers=(0,) * stages)
        error = error_of(lambda: list(wrong.stream(model, table)))
        assert isinstance(error, ValueError), repr(error)
        assert "pipeline stage 1 hold" in str(error), error


class Broken(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(f"cannot read {name}")
        self.unpicklable = lambda: None


class Unreadable(dict):
    def __getitem__(self, name: str) -> Tensor:
        if name == LAST_NORM:
            raise Broken(name)
        return super().__getitem__(name)


def error_of(use: Callable[[], object]) -> Exception:
    try:
        use()
    except Exception as error:  # noqa: BLE001 (returned)
        return error
    raise AssertionError("no error was raised")


def main() -> None:
    dist.init_process_group("gloo")
    checked = []
    for stage_layers, tensor_size in LAYOUTS:
        place = replica(stage_layers, tensor_size)
        for tied in (True, False):
            config, model = make_tiny_qwen3vl(tied=tied, vocab=163, layers=sum(stage_layers), vision_depth=2)
            table, tensors = table_for(config), model.state_dict()
            check_equal_to_one_process(place, table, tensors)
            if tied:
                check_tied_copy(place, table, tensors)
        check_lazy(place, table, tensors)
        check_errors_reach_every_rank(place, table, tensors)
        checked.append([list(stage_layers), tensor_size])
    report_result(checked)


if __name__ == "__main__":
    main()
