# SPDX-License-Identifier: Apache-2.0
"""Peak memory and time of the log-probabilities: ours against log_softmax, gather and entropy with autograd.

Both arms compute the same from the same inputs, forward and backward: the log-probability of each label and the entropy
of each distribution at a temperature, and the gradients of hidden states and output matrix. Each measurement is a fresh
process; the arms take turns. The peak is the kernel's high-water mark of resident memory beyond what is resident before
the forward pass (inputs, libraries). Three times: the wall clock's; the processor's, which on a machine that others use
is the fairer; and of that the part outside of the kernel, which leaves out what it costs to get fresh memory (torch's
CPU allocator keeps none).

    python benchmarks/logprobs.py --hidden 64 1024 2048

Each hidden size in two settings: with a trainable output matrix, whose gradient ``[V, h]`` is then part of the peak of
both arms, and with a frozen one, which leaves what the loss itself adds (and the gradient of the hidden states).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_g2rpo.policy.logprobs import linear_logprobs

ARMS = ("plain", "ours")
MIB = 2**20


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """What one writes first; ``[2, S]`` like ours."""
    log_p = ((hidden @ weight.t()).float() / temperature).log_softmax(dim=-1)
    logprob = log_p.gather(1, labels[:, None]).squeeze(1)
    return torch.stack([logprob, -(log_p.exp() * log_p).sum(dim=-1)])


def resident(field: str) -> int:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (the most since the last reset) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def reset_high_water_mark() -> None:
    """``VmHWM`` starts again from ``VmRSS``; raises where the kernel does not do that."""
    Path("/proc/self/clear_refs").write_text("5")
    if resident("VmHWM") - resident("VmRSS") > 16 * MIB:
        raise RuntimeError("this kernel does not reset VmHWM")


def clocks() -> dict[str, float]:
    """Seconds by the wall clock, of this process on the processor, and of those outside of the kernel."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {"wall": time.perf_counter(), "processor": usage.ru_utime + usage.ru_stime, "user": usage.ru_utime}


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One forward and backward pass of one arm in this process: seconds, bytes, and what it computed."""
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    tokens, vocabulary, h = options.tokens, options.vocabulary, options.hidden[0]

    def compute(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        if options.arm == "plain":
            return plain(hidden, weight, labels, options.temperature)
        return linear_logprobs(
            hidden,
            weight,
            labels,
            vocab_size=len(weight),
            temperature=options.temperature,
            chunk_size=options.chunk_size,
        )

    run(compute, *inputs(8, 64, h, dtype, not options.frozen))  # libraries load their kernels
    hidden, weight, labels, grad = inputs(tokens, vocabulary, h, dtype, not options.frozen)
    reset_high_water_mark()
    before = resident("VmRSS")
    started = clocks()
    output = run(compute, hidden, weight, labels, grad)
    spent = {name: now - started[name] for name, now in clocks().items()}
    assert hidden.grad is not None
    return {
        **spent,
        "bytes": resident("VmHWM") - before,
        "logprob": output[0].double().mean().item(),
        "entropy": output[1].double().mean().item(),
        "grad_hidden": hidden.grad.double().norm().item(),
        "grad_weight": weight.grad.double().norm().item() if weight.grad is not None else 0.0,
        "load": os.getloadavg()[0],
    }


def inputs(tokens: int, vocabulary: int, h: int, dtype: torch.dtype, trainable: bool) -> tuple[Tensor, ...]:
    """Hidden states, matrix, labels and the gradient that comes in; logits have a deviation of about 3."""
    hidden = torch.randn(tokens, h, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, h, dtype=dtype).mul_(3 / h**0.5).requires_grad_(trainable)
    return hidden, weight, torch.randint(vocabulary, (tokens,)), torch.randn(2, tokens)


def run(compute: Callable[..., Tensor], hidden: Tensor, weight: Tensor, labels: Tensor, grad: Tensor) -> Tensor:
    """Forward and backward pass."""
    output = compute(hidden, weight, labels)
    output.backward(grad)
    return output.detach()


def in_fresh_process(arm: str, frozen: bool, h: int, options: argparse.Namespace) -> dict[str, float]:
    """What ``measure`` returns."""
    command = [sys.executable, __file__, "--arm", arm, "--hidden", str(h), *(["--frozen"] if frozen else [])]
    for name in ("tokens", "vocabulary", "threads", "temperature", "dtype", "chunk_size"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def check_that_arms_agree(results: dict[str, list[dict[str, float]]], tolerance: float) -> None:
    """Means of the outputs and norms of the gradients; raises unless they agree to the relative tolerance."""
    for name in ("logprob", "entropy", "grad_hidden", "grad_weight"):
        ours, theirs = results["ours"][0][name], results["plain"][0][name]
        if abs(ours - theirs) > tolerance * abs(theirs):
            raise AssertionError(f"the arms do not compute the same: {name} is {ours} and {theirs}")


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def compare(h: int, frozen: bool, options: argparse.Namespace) -> str:
    """A line of the table."""
    results: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for _ in range(options.repetitions):
        for arm in ARMS:
            results[arm].append(in_fresh_process(arm, frozen, h, options))
    check_that_arms_agree(results, 1e-4 if options.dtype == "float32" else 2e-2)

    def column(arm: str, name: str) -> list[float]:
        return [row[name] for row in results[arm]]

    def ratios(name: str) -> list[float]:
        return [ours / plain for ours, plain in zip(column("ours", name), column("plain", name), strict=True)]

    mib = [statistics.median(column(arm, "bytes")) / MIB for arm in ARMS]
    cells = [
        f"{h}",
        "frozen" if frozen else "trainable",
        *(f"{one:,.0f}" for one in mib),
        f"1/{mib[0] / mib[1]:.1f}",
        *(spread(column(arm, "wall")) for arm in ARMS),
        *(spread(ratios(name)) for name in ("wall", "processor", "user")),
        f"{max(column('plain', 'load') + column('ours', 'load')):.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print a table: a line for each hidden size and setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 1024, 2048])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--chunk-size", type=int, default=1024, help="tokens, of our arm (default 1024)")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--frozen", action="store_true", help="only with a frozen output matrix")
    parser.add_argument("--arm", choices=ARMS, help="measure this one in this process, print JSON")
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(measure(options)))
        return
    print(
        f"{options.tokens:,} tokens x {options.vocabulary:,} vocabulary, {options.dtype}, threads: {options.threads}, "
        f"chunks of {options.chunk_size} tokens, median (range) of {options.repetitions}\n\n"
        "| h | output matrix | plain, MiB | ours, MiB | memory ratio | plain, s | ours, s "
        "| time ratio: wall | processor | outside the kernel | load |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|"
    )
    for h in options.hidden:
        for frozen in (True,) if options.frozen else (False, True):
            print(compare(h, frozen, options), flush=True)


if __name__ == "__main__":
    main()
