# SPDX-License-Identifier: Apache-2.0
"""Tables of parameter names: Megatron's, Hugging Face's, and the shard rule between them. ``models`` fills them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from megatron_g2rpo.weights.rules import ShardRule


@dataclass(frozen=True)
class Entry:
    """The Hugging Face tensors that one Megatron parameter holds, and how it is sharded.

    Attributes:
        hf_names: names of the Hugging Face tensors, in the order in which the rule takes them.
        rule: rule by which the parameter is sharded.
        copy: whether another pipeline stage holds the original; a copy is loaded, and not streamed again.
    """

    hf_names: tuple[str, ...]
    rule: ShardRule
    copy: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a weight table: the names of a parameter, with the same placeholders on both sides.

    Attributes:
        megatron: Megatron name of the parameter; ``{layer}`` stands for a layer number, ``{path}`` for any name.
        hf: names of the Hugging Face tensors that the parameter holds.
        rule: rule by which the parameter is sharded.
        copy: whether another pipeline stage holds the original, see ``Entry``.
    """

    megatron: str
    hf: tuple[str, ...]
    rule: ShardRule
    copy: bool = False


class UnmappedParameter(KeyError):
    """A parameter that the table does not know."""


class WeightTable:
    """Looks up the parameters of one model family, by Megatron or Hugging Face name.

    Args:
        rows: the rows of the table; the first row that matches the whole name is taken, so an original stands above its
            copy, and the local layer spec's names above Transformer Engine's.
        ignored: Hugging Face tensors that a checkpoint may hold and no parameter needs.
    """

    def __init__(self, rows: Sequence[Row], ignored: Collection[str] = ()) -> None:
        self.rows = tuple(rows)
        self.ignored = frozenset(ignored)

    def entry(self, megatron_name: str, layer_offset: int = 0) -> Entry:
        """Return the entry of one parameter.

        Args:
            megatron_name: the parameter's name in ``named_parameters()`` of the unwrapped model; layer numbers count
                from this pipeline stage's first layer.
            layer_offset: number of layers on earlier stages.

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
        """Return the Megatron parameters of a checkpoint, from its tensors' names alone.

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
