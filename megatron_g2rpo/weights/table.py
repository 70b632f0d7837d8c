# SPDX-License-Identifier: Apache-2.0
"""The one table of parameter names: Megatron's, Hugging Face's, and the shard rule between them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_g2rpo.weights.rules import GateUp, GroupedQKV, Replicated, ShardRule, Split, Vocabulary


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter: the Hugging Face tensors it holds and how it is sharded.

    Attributes:
        hf_names: the tensors, in the order in which the rule takes them.
        rule: how it is sharded.
        copy: another pipeline stage holds the original: it is loaded, and not streamed again.
    """

    hf_names: tuple[str, ...]
    rule: ShardRule
    copy: bool = False


@dataclass(frozen=True)
class Row:
    """A line of a table: names with placeholders, the same on both sides.

    Attributes:
        megatron: name of the parameter; ``{layer}`` stands for a layer number, ``{path}`` for any name.
        hf: names of the Hugging Face tensors it holds.
        rule: how it is sharded.
        copy: see ``Entry``.
    """

    megatron: str
    hf: tuple[str, ...]
    rule: ShardRule
    copy: bool = False


class UnmappedParameter(KeyError):
    """A parameter that the table does not know."""


class WeightTable:
    """Looks up parameters of one model family, by either name.

    Args:
        rows: the table; the first row that matches the whole name is taken, so an original stands above its copy, and
            the local layer spec's names above Transformer Engine's.
        ignored: Hugging Face tensors that a checkpoint may hold and no parameter needs.
    """

    def __init__(self, rows: Sequence[Row], ignored: Collection[str] = ()) -> None:
        self.rows = tuple(rows)
        self.ignored = frozenset(ignored)

    def entry(self, megatron_name: str, layer_offset: int = 0) -> Entry:
        """The entry of one parameter.

        Args:
            megatron_name: as in ``named_parameters()`` of the unwrapped model; layer numbers count from this pipeline
                stage's first layer.
            layer_offset: layers on earlier stages.

        Raises:
            UnmappedParameter: no row matches.
        """
        for row in self.rows:
            match = _pattern(row.megatron).fullmatch(megatron_name)
            if match:
                fields = match.groupdict()
                if "layer" in fields:
                    fields["layer"] = str(int(fields["layer"]) + layer_offset)
                return _filled(row, fields)
        raise UnmappedParameter(f"no row of the weight table matches the Megatron parameter {megatron_name!r}")

    def parameters(self, hf_names: Iterable[str]) -> list[tuple[str, Entry]]:
        """The Megatron parameters of a checkpoint, from its names alone.

        Args:
            hf_names: all Hugging Face tensors of the model, in any order.

        Returns:
            Megatron name (of the local layer spec; layers numbered over all pipeline stages) and entry of every
            parameter, in the order of the names. Each of the names is in one entry, unless it is one of ``ignored``;
            no entry is a copy.

        Raises:
            UnmappedParameter: no row produces a name, or a parameter would lack some of its tensors.
        """
        given = dict.fromkeys(hf_names)
        used: set[str] = set()
        parameters = []
        for hf_name in given:
            if hf_name in used or hf_name in self.ignored:
                continue
            megatron_name, entry = self._holder(hf_name)
            missing = [name for name in entry.hf_names if name not in given]
            if missing:
                raise UnmappedParameter(f"{megatron_name} holds {hf_name}, but also {', '.join(missing)}")
            used.update(entry.hf_names)
            parameters.append((megatron_name, entry))
        return parameters

    def _holder(self, hf_name: str) -> tuple[str, Entry]:
        for row in self.rows:
            for template in row.hf:
                match = _pattern(template).fullmatch(hf_name)
                if match:
                    return row.megatron.format(**match.groupdict()), _filled(row, match.groupdict())
        raise UnmappedParameter(f"no row of the weight table produces the Hugging Face tensor {hf_name!r}")


_PLACEHOLDERS = {"layer": r"\d+", "path": r".+"}


@cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)  # text, placeholder, text, ...
    parts[::2] = map(re.escape, parts[::2])
    parts[1::2] = (f"(?P<{name}>{_PLACEHOLDERS[name]})" for name in parts[1::2])
    return re.compile("".join(parts))


def _filled(row: Row, fields: dict[str, str]) -> Entry:
    return Entry(tuple(hf.format(**fields) for hf in row.hf), row.rule, row.copy)


def qwen3_vl(hf_config: Any) -> WeightTable:
    """Qwen3-VL, dense."""
    text = hf_config.text_config
    layer, hf_layer = "language_model.decoder.layers.{layer}.", "model.language_model.layers.{layer}."
    attention, hf_attention = layer + "self_attention.", hf_layer + "self_attn."
    embedding, output = "model.language_model.embed_tokens.weight", "lm_head.weight"
    tied = bool(hf_config.tie_word_embeddings)
    vocabulary = Vocabulary(text.vocab_size)
    qkv = GroupedQKV(text.num_attention_heads, text.num_key_value_heads, text.head_dim)
    gate_up = (hf_layer + "mlp.gate_proj.weight", hf_layer + "mlp.up_proj.weight")
    input_norm, mlp_norm = (hf_layer + "input_layernorm.weight",), (hf_layer + "post_attention_layernorm.weight",)
    one = Replicated()
    return WeightTable(
        [
            Row("vision_model.{path}", ("model.visual.{path}",), one),
            Row("language_model.embedding.word_embeddings.weight", (embedding,), vocabulary),
            # Under tied weights only a last pipeline stage that is not the first has an output matrix.
            Row("language_model.output_layer.weight", (embedding if tied else output,), vocabulary, copy=tied),
            Row("language_model.decoder.final_layernorm.weight", ("model.language_model.norm.weight",), one),
            Row(layer + "input_layernorm.weight", input_norm, one),
            Row(layer + "pre_mlp_layernorm.weight", mlp_norm, one),
            # Transformer Engine's linears hold the norm before them.
            Row(layer + "self_attention.linear_qkv.layer_norm_weight", input_norm, one),
            Row(layer + "mlp.linear_fc1.layer_norm_weight", mlp_norm, one),
            Row(
                attention + "linear_qkv.weight",
                tuple(f"{hf_attention}{part}_proj.weight" for part in ("q", "k", "v")),
                qkv,
            ),
            Row(attention + "linear_proj.weight", (hf_attention + "o_proj.weight",), Split(1)),
            Row(attention + "q_layernorm.weight", (hf_attention + "q_norm.weight",), one),
            Row(attention + "k_layernorm.weight", (hf_attention + "k_norm.weight",), one),
            Row(layer + "mlp.linear_fc1.weight", gate_up, GateUp()),
            Row(layer + "mlp.linear_fc2.weight", (hf_layer + "mlp.down_proj.weight",), Split(1)),
        ],
        ignored=[output] if tied else [],  # a tied checkpoint may store the embedding twice
    )


TABLES: dict[str, Callable[[Any], WeightTable]] = {"qwen3_vl": qwen3_vl}


def table_for(hf_config: Any) -> WeightTable:
    """The table of a model family.

    Raises:
        KeyError: the family has none.
    """
    if hf_config.model_type not in TABLES:
        raise KeyError(f"no weight table for model type {hf_config.model_type!r}; known: {sorted(TABLES)}")
    return TABLES[hf_config.model_type](hf_config)
