# SPDX-License-Identifier: Apache-2.0
"""Claim: Transformer Engine's attention, through megatron-core, takes and computes what the policy asks of it.

It runs on GPUs only, so this holds the way there: what ours passes to megatron-core's wrapper (here, and with all other
calls in ``test_megatron_core.py``), what the wrapper passes on, by source; and, with an attention of plain torch in its
place, shapes and the meaning of every field. What runs on a GPU is compared in ``tests/gpu``; this also holds for the
newest release of megatron-core, of which only the source is read.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import megatron.core
import pytest
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from megatron_g2rpo.data.packing import Packer, PackSequence
from megatron_g2rpo.policy.attention import PackedCoreAttention, TransformerEngineCoreAttention
from megatron_g2rpo.policy.packed_row import packed_row_params
from megatron_g2rpo.types import ModelInputs, PackedBatch
from tests.contract.calls import (
    CORE_ATTENTION_BUILT,
    DOT_PRODUCT_ATTENTION,
    METHODS,
    PACKED,
    SPEC_PLACES,
    TE_ATTENTION,
    TE_ATTENTION_BUILT,
    TE_ATTENTION_CALLED,
    TE_COLUMN,
    TE_LAYERS,
    our_calls,
)
from tests.contract.release import ANY, Release
from tests.contract.signatures import HERE, megatron_core, vendored
from tests.contract.test_megatron_core import NEWEST

TRANSFORMER_ENGINE = "2.20.2"  # of the extra `te` in pyproject.toml
VERSIONS = ["installed", NEWEST]
HEADS, GROUPS, DIM = 4, 2, 8
SCALE = 0.3


def signatures(version: str) -> dict[str, dict[str, bool]]:
    """Of megatron-core."""
    if version == NEWEST:
        return json.loads(vendored("megatron_core", NEWEST).read_text())
    return megatron_core(Release(Path(megatron.core.__file__).parents[2]))


def transformer_engine() -> dict[str, dict[str, bool]]:
    return json.loads(vendored("transformer_engine", TRANSFORMER_ENGINE).read_text())


def test_the_release_is_that_of_pyproject() -> None:
    assert f'"transformer-engine[core_cu13]=={TRANSFORMER_ENGINE};' in (HERE.parents[1] / "pyproject.toml").read_text()


@pytest.mark.parametrize("version", VERSIONS)
def test_the_wrapper_is_built_with_what_attention_passes(version: str) -> None:
    function, callee = CORE_ATTENTION_BUILT
    assert signatures(version)[f"{function} > {callee}"].keys() == METHODS[TE_ATTENTION]


@pytest.mark.parametrize("version", VERSIONS)
def test_transformer_engine_takes_what_the_wrapper_passes(version: str) -> None:
    passes, takes = signatures(version), transformer_engine()
    for (function, callee), target in (
        (TE_ATTENTION_BUILT, DOT_PRODUCT_ATTENTION),
        (TE_ATTENTION_CALLED, f"{DOT_PRODUCT_ATTENTION}.forward"),
    ):
        passed = passes[f"{function} > {callee}"]
        by_keyword = {name for name, by_keyword in passed.items() if by_keyword and name != ANY}
        assert by_keyword
        assert by_keyword <= takes[target].keys()
        # What is not spelled out are the fields of the packed row: see the next test.
        assert (ANY in passed) == ((function, callee) == TE_ATTENTION_CALLED)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_field_of_a_packed_row_arrives(version: str) -> None:
    arriving = signatures(version)[f"{PACKED} > {TE_ATTENTION}"].keys()
    assert our_calls()[PACKED].keywords <= arriving
    assert arriving <= transformer_engine()[f"{DOT_PRODUCT_ATTENTION}.forward"].keys()


@pytest.mark.parametrize("version", VERSIONS)
def test_attention_of_a_row_with_shared_prompts_is_transformer_engines_own(version: str) -> None:
    """It goes past the wrapper, a subclass of the class whose ``forward`` it is."""
    tree = ast.parse(Path(inspect.getfile(TransformerEngineCoreAttention)).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (call,) = (node for node in calls if ast.unparse(node.func) == "DotProductAttention.forward")
    passed = {keyword.arg for keyword in call.keywords}
    assert len(call.args) == 1, "self"
    assert len(passed) == 9
    assert passed <= transformer_engine()[f"{DOT_PRODUCT_ATTENTION}.forward"].keys()
    assert f"{TE_ATTENTION}.__init__ > super().__init__" in signatures(version)


# -- layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("function", "place", "target"), SPEC_PLACES, ids=lambda text: text.rpartition(".")[2])
def test_layers_take_what_they_are_built_with(version: str, function: str, place: str, target: str) -> None:
    """What megatron-core builds a place of our spec with, is taken by the module that we put there."""
    release = signatures(version)
    built, takes = release[f"{function} > {place}"], release[target]
    by_keyword = {name for name, keyword in built.items() if keyword}
    assert ANY in takes or by_keyword <= takes.keys(), by_keyword - takes.keys()
    needed = {name for name, must in takes.items() if must} - by_keyword
    assert len(needed) == sum(not keyword for keyword in built.values()), (needed, built)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("wrapper", TE_LAYERS)
def test_transformer_engines_layers_take_what_the_wrappers_pass(version: str, wrapper: str) -> None:
    passed = signatures(version)[f"{wrapper}.__init__ > super().__init__"]
    # `ub_`: communication that overlaps with products, which is off; names of old releases are among them.
    by_keyword = {name for name, keyword in passed.items() if keyword and name != ANY and not name.startswith("ub_")}
    assert by_keyword
    assert by_keyword <= transformer_engine()[TE_LAYERS[wrapper]].keys()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_linear_takes_hidden_states_alone(version: str) -> None:
    assert signatures(version)[f"{TE_COLUMN}.forward"] == {"x": True}


def test_a_keyword_that_a_layer_does_not_take_is_seen(tmp_path: Path) -> None:
    """Negative: both ways of building a place are read, and what is not there is an error."""
    package = tmp_path / "megatron" / "core"
    package.mkdir(parents=True)
    (package / "package_info.py").write_text("MAJOR = 1\nMINOR = 2\nPATCH = 3\n")
    (package / "mlp.py").write_text(
        "def build(submodules):\n"
        "    build_module(submodules.fc1, 3, config=1)\n"
        "    norm = submodules.fc2 or 5\n"
        "    norm(4, fly=2)\n"
    )
    release = Release(tmp_path)
    assert release.built("megatron.core.mlp.build", "submodules.fc1") == {"3": False, "config": True}
    assert release.built("megatron.core.mlp.build", "submodules.fc2") == {"4": False, "fly": True}
    with pytest.raises(LookupError, match=r"does not build submodules\.fc3"):
        release.built("megatron.core.mlp.build", "submodules.fc3")


# -- with plain torch in its place --------------------------------------------------------------------------------


class PlainTorch(nn.Module):
    """``TEDotProductAttention`` for packed ("thd") rows, one sequence after the other.

    As Transformer Engine documents it: tokens ``[T, heads, dim]`` to ``[T, heads * dim]``; sequence i lies at
    ``cu_seqlens_q_padded[i]``, and has ``cu_seqlens_q[i + 1] - cu_seqlens_q[i]`` tokens.
    """

    def __init__(self, config: Any, layer_number: int, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        assert type(packed_seq_params) is PackedSeqParams  # every field of a subclass would be passed on as well
        assert (packed_seq_params.qkv_format, attn_mask_type, attention_mask) == ("thd", AttnMaskType.causal, None)
        lengths = [end - start for start, end in pairwise(packed_seq_params.cu_seqlens_q.tolist())]
        spans = list(pairwise(packed_seq_params.cu_seqlens_q_padded.tolist()))
        assert packed_seq_params.max_seqlen_q == max(end - start for start, end in spans)
        assert len(query) == spans[-1][1]
        for x in (query, key, value):  # `get_qkv_layout` refuses what `contiguous` returns with other strides
            assert x.contiguous().stride() == torch.empty(x.shape).stride()
            assert x.contiguous().storage_offset() == 0
        out = query.new_zeros(len(query), query.shape[1] * query.shape[2])
        for length, (start, _) in zip(lengths, spans, strict=True):
            q, k, v = (x[start : start + length].transpose(0, 1) for x in (query, key, value))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
            out[start : start + length] = attended.transpose(0, 1).flatten(1)
        return out


class PlainTorchSpans:
    """``DotProductAttention`` with more keys than queries: the last query of a sequence attends to all of its keys."""

    @staticmethod
    def forward(
        self: PlainTorch,
        *,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        qkv_format: str,
        attn_mask_type: str,
        cu_seqlens_q: Tensor,
        cu_seqlens_kv: Tensor,
        max_seqlen_q: int,
        max_seqlen_kv: int,
    ) -> Tensor:
        assert (qkv_format, attn_mask_type) == ("thd", "padding_causal_bottom_right")
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
        queries, keys = (list(pairwise(x.tolist())) for x in (cu_seqlens_q, cu_seqlens_kv))
        assert (queries[-1][1], keys[-1][1]) == (len(query_layer), len(key_layer))
        assert max_seqlen_q == max(end - start for start, end in queries)
        assert max_seqlen_kv == max(end - start for start, end in keys)
        out = []
        for (first, last), (start, end) in zip(queries, keys, strict=True):
            q, k, v = (
                x[slice(*span)].transpose(0, 1)
                for x, span in (
                    (query_layer, (first, last)),
                    (key_layer, (start, end)),
                    (value_layer, (start, end)),
                )
            )
            mask = torch.ones(last - first, end - start, dtype=torch.bool).tril(end - start - (last - first))
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=True)
            out.append(attended.transpose(0, 1).flatten(1))
        return torch.cat(out)


@pytest.fixture
def attentions(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, nn.Module]:
    """Ours for Transformer Engine, with plain torch in its place, and the local one."""
    module: Any = ModuleType("megatron.core.extensions.transformer_engine")
    module.TEDotProductAttention = PlainTorch
    monkeypatch.setitem(sys.modules, module.__name__, module)
    engine: Any = ModuleType("transformer_engine.pytorch")
    engine.DotProductAttention = PlainTorchSpans
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, engine.__name__, engine)
    arguments = {
        "config": SimpleNamespace(context_parallel_size=1),
        "layer_number": 1,
        "attn_mask_type": AttnMaskType.causal,
        "attention_type": "self",
        "cp_comm_type": "p2p",
        "softmax_scale": SCALE,
        "pg_collection": None,
    }
    return TransformerEngineCoreAttention(**arguments), PackedCoreAttention(**arguments)


def inputs_of(prompt: int) -> ModelInputs:
    none = torch.zeros(0, 12), torch.zeros(0, 3, dtype=torch.int64)
    return ModelInputs(token_ids=torch.arange(prompt), pixel_values=none[0], image_grid_thw=none[1])


def row(*lengths: int, multiple: int, answers: tuple[int, ...] = ()) -> PackedBatch:
    """Sequences of these lengths, each padded to a multiple; then a group of answers to a prompt of 12 tokens."""
    sequences = [PackSequence(inputs=inputs_of(length - 1), response_ids=torch.tensor([1])) for length in lengths]
    shared = inputs_of(12)
    sequences += [PackSequence(inputs=shared, response_ids=torch.arange(length)) for length in answers]
    packer = Packer(98, 2, 99, sequence_multiple=multiple, row_multiple=multiple, shared_prefix=bool(answers))
    (batch,) = packer.pack(sequences, budget=200)
    return batch


@pytest.mark.parametrize("answers", [(), (3, 1, 14)], ids=["whole", "shared"])
@pytest.mark.parametrize("multiple", [1, 8], ids=["dense", "padded"])
def test_a_packed_row_is_attended_alike(
    attentions: tuple[nn.Module, nn.Module], multiple: int, answers: tuple[int, ...]
) -> None:
    batch = row(5, 16, 2, 9, multiple=multiple, answers=answers)
    assert bool((batch.parents >= 0).any()) == bool(answers)
    generator = torch.Generator().manual_seed(0)
    tokens = len(batch.tokens)
    inputs = [
        torch.randn(tokens, 1, heads, DIM, generator=generator, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS)
    ]
    grad = torch.randn(tokens, 1, HEADS * DIM, generator=generator)
    results = []
    for attention in attentions:
        out = attention(
            *inputs,
            None,
            attn_mask_type=AttnMaskType.causal,
            attention_bias=None,
            packed_seq_params=packed_row_params(batch, buckets=isinstance(attention, PackedCoreAttention)),
        )
        results.append((out, *torch.autograd.grad(out, inputs, grad)))
    for ours, local in zip(*results, strict=True):
        torch.testing.assert_close(ours, local, rtol=0, atol=1e-5)  # fp32 sums in another order


def test_a_row_of_one_token_is_handed_over_as_one_of_its_own(attentions: tuple[nn.Module, nn.Module]) -> None:
    """A slice of the projection's output with one key/value head is contiguous for torch, whatever its strides."""
    batch = row(2, multiple=1)
    packer = Packer(98, 2, pad_token_id=99)
    (empty,) = packer.pack([], budget=8, num_bins=1)
    assert (len(batch.tokens), len(empty.tokens)) == (2, 1)
    for one in (batch, empty):
        mixed = torch.randn(len(one.tokens), 1, 1, 4 * DIM)
        q, k, v = mixed.split([2 * DIM, DIM, DIM], dim=-1)
        inputs = q.reshape(len(q), 1, 2, DIM), k, v
        ours, local = (
            attention(*inputs, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=packed_row_params(one))
            for attention in attentions
        )
        real = one.cu_seqlens[-1] if one is batch else 0
        torch.testing.assert_close(ours[:real], local[:real], rtol=0, atol=1e-5)


def test_a_row_without_padding_says_so() -> None:
    """Transformer Engine compares the two offsets by identity; more kernels take a row without padding."""
    dense, padded = packed_row_params(row(5, 16, multiple=1)), packed_row_params(row(5, 16, multiple=8))
    assert dense.cu_seqlens_q_padded is dense.cu_seqlens_q
    assert dense.cu_seqlens_kv_padded is dense.cu_seqlens_kv
    assert padded.cu_seqlens_q_padded is not padded.cu_seqlens_q
    assert padded.cu_seqlens_q_padded.tolist() == [0, 8, 24]
