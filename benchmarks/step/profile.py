# SPDX-License-Identifier: Apache-2.0
"""Say where our passes' time goes: by kind (matrix product, attention, neither), by operator and by module.

    python -m benchmarks.step.profile i [--unshared] [--directory runs/bench-step]

Profiles the log-probability pass and the update (forward, backward, optimizer) of one step of a size under
``torch.profiler``, whose clock is the wall's: on a machine that does other work the shares are blurred. An operator of
the backward pass counts for the module whose forward operator it belongs to, by autograd's sequence number.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.step.ours import Side
from benchmarks.step.run import DIRECTORY
from benchmarks.step.sizes import BY_NAME

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "mv", "addmv_", "mkldnn_convolution", "convolution_backward")
PREFIX = "module: "
# The last part of a module's name -> how it is called in the table; modules inside of these count for them.
MODULES = {
    "vision_model": "vision tower: other",
    "patch_embed": "vision tower: patches",
    "attn": "vision tower: attention",
    "norm1": "vision tower: norms",
    "norm2": "vision tower: norms",
    "merger": "vision tower: mergers",
    "deepstack_merger_list": "vision tower: mergers",
    "embedding": "embedding",
    "input_layernorm": "norms",
    "pre_mlp_layernorm": "norms",
    "final_layernorm": "norms",
    "q_layernorm": "norms of queries and keys",
    "k_layernorm": "norms of queries and keys",
    "linear_qkv": "linears",
    "linear_proj": "linears",
    "linear_fc1": "linears",
    "linear_fc2": "linears",
    "activation_func": "activation",
    "core_attention": "core attention and rotation",
    "output_layer": "output layer, log-probabilities",
}
OUTSIDE = "outside of modules"


def kind(name: str) -> str:
    """Return the kind of an operator."""
    if "scaled_dot_product" in name:
        return "attention"
    return "matrix product" if name.removeprefix("aten::") in PRODUCTS else "neither"


def annotate(model: nn.Module, stack: ExitStack) -> None:
    """Mark the forward pass of the modules of the table in what is profiled, until the stack is left."""
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        label = MODULES.get(last, "vision tower: MLP" if ".blocks." in name and last == "mlp" else None)
        if label is None and ".deepstack_merger_list." in name and name.count(".") == 2:
            label = "vision tower: mergers"
        if label is not None and not isinstance(module, nn.ModuleList):
            stack.enter_context(patch.object(module, "forward", _marked(module.forward, PREFIX + label)))


def _marked(forward: Callable[..., Any], label: str) -> Callable[..., Any]:
    def marked(*args: Any, **keywords: Any) -> Any:
        with record_function(label):
            return forward(*args, **keywords)

    return marked


def by_module(events: Iterable[FunctionEvent]) -> Counter[tuple[str, str]]:
    """Return the seconds of operators, by module and kind."""
    events = [event for event in events if not event.name.startswith(PREFIX)]
    forward: dict[int, str] = {}
    for event in events:
        module = _enclosing(event)
        if module is not None and event.sequence_nr >= 0:
            forward.setdefault(event.sequence_nr, module)
    seconds: Counter[tuple[str, str]] = Counter()
    for event in events:
        module = _enclosing(event) or _of_forward(event, forward) or OUTSIDE
        seconds[module, kind(event.name)] += event.self_cpu_time_total / 1e6  # pyright: ignore[reportArgumentType]
    return seconds


def _enclosing(event: FunctionEvent | None) -> str | None:
    while event is not None:
        if event.name.startswith(PREFIX):
            return event.name.removeprefix(PREFIX)
        event = event.cpu_parent
    return None


def _of_forward(event: FunctionEvent | None, forward: dict[int, str]) -> str | None:
    """Return the module of the forward operator that an operator of the backward pass belongs to."""
    while event is not None:
        if event.name.startswith("autograd::engine::evaluate_function") and event.sequence_nr in forward:
            return forward[event.sequence_nr]
        if event.name.startswith("Optimizer.step"):
            return "optimizer"
        event = event.cpu_parent
    return None


def tables(title: str, events: Sequence[FunctionEvent], operators: int) -> str:
    """Return the shares of a pass as text."""
    modules = by_module(events)
    total = sum(modules.values())
    kinds: Counter[str] = Counter()
    rows: dict[str, Counter[str]] = {}
    names: Counter[str] = Counter()
    for (module, kind_), seconds in modules.items():
        kinds[kind_] += seconds
        rows.setdefault(module, Counter())[kind_] += seconds
    for event in events:
        if not event.name.startswith(PREFIX):
            names[event.name] += event.self_cpu_time_total / 1e6  # pyright: ignore[reportArgumentType]
    columns = ("matrix product", "attention", "neither")
    lines = [f"## {title}: {total:.3f} s", "", f"| module | all | {' | '.join(columns)} |", "|---|---|---|---|---|"]
    shown = [("all", kinds), *sorted(rows.items(), key=lambda row: -row[1].total())]
    for module, counts in shown:
        cells = (f"{counts[column] / total:.1%}" for column in columns)
        lines.append(f"| {module} | {counts.total() / total:.1%} | {' | '.join(cells)} |")
    lines += ["", "| operator | share |", "|---|---|"]
    lines += [f"| `{name}` ({kind(name)}) | {seconds / total:.1%} |" for name, seconds in names.most_common(operators)]
    return "\n".join([*lines, ""])


def recorded_update(side: Side) -> tuple[Callable[[], Any], list[Any]]:
    """Take a step; returns a function that takes its last update again, and the update's micro-batches."""
    policy, calls = side.components.policy, []
    update = policy.update

    def recording(*args: Any, **keywords: Any) -> Any:
        calls.append((args, keywords))
        return update(*args, **keywords)

    with patch.object(policy, "update", recording):
        side.step()
    args, keywords = calls[-1]
    return lambda: update(*args, **keywords), args[0]


def profiled(run: Callable[[], Any], model: nn.Module) -> list[FunctionEvent]:
    """Return the events of the second of two runs."""
    run()
    with ExitStack() as stack:
        annotate(model, stack)
        profiler = stack.enter_context(profile(activities=[ProfilerActivity.CPU]))
        run()
    return list(profiler.events() or [])


def main() -> None:
    """Profile one size, and write its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=sorted(BY_NAME))
    parser.add_argument("--unshared", action="store_true", help="every answer with a copy of its prompt")
    parser.add_argument("--directory", type=Path, default=DIRECTORY)
    parser.add_argument("--operators", type=int, default=15, help="operators to list")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    side = Side(BY_NAME[arguments.size], arguments.directory, shared=not arguments.unshared)
    (update, batches), policy = recorded_update(side), side.components.policy
    score = partial(policy.logprobs, batches)
    text = "\n".join(
        [
            f"# ({arguments.size}), the prompt {'not ' if arguments.unshared else ''}shared",
            "",
            tables("Log-probability pass", profiled(score, policy.model), arguments.operators),
            tables("Update", profiled(update, policy.model), arguments.operators),
        ]
    )
    name = f"profile-{arguments.size}{'-unshared' if arguments.unshared else ''}.md"
    (arguments.directory / name).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
