# SPDX-License-Identifier: Apache-2.0
"""Conversion at real size: ``convert import`` and ``convert export`` beside a plain copy of the same files.

The model has the published dimensions of Qwen3-VL-2B-Instruct, 2,127,532,032 parameters, all random, in bf16: 4.26 GB
in shards of at most 2 GB. It is written to a scratch directory that is removed at the end; 18 GB must be free there.

    python benchmarks/convert.py [--dir SCRATCH] [--rounds 4] [--nproc 2] [--cached]

Each round runs an export of the quickstart's small policy, which is what a process costs before weights matter, an
import, and, in alternating order, a copy (``cp --reflink=never``) and an export, each as a process of its own. Before
each, everything written so far is on the disk, and all of it is dropped from the page cache, what it will read and what
others have left there, so that neither is served better (with ``--cached`` it stays).
"Returns" is the time of the process, "on disk" that and an fsync of every file it wrote; no arm but the import waits
for the disk by itself. Memory is the resident peak of the largest process, mapped files included. At the end every
exported tensor is compared with its original.

A small process inherits the peak of the one that starts it, so that peaks below this benchmark's own are not shown.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from megatron_g2rpo import weights

# Published dimensions; the parameters they make are counted below.
CONFIG = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "tie_word_embeddings": True,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "text_config": {
        "model_type": "qwen3_vl_text",
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262144,
        "rope_theta": 5000000,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
    },
    "vision_config": {
        "model_type": "qwen3_vl",
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2048,
        "deepstack_visual_indexes": [5, 11, 17],
    },
}
PARAMETERS = 2_127_532_032  # of Qwen3-VL-2B-Instruct, as the hub counts them
SMALL = Path(__file__).parents[1] / "examples/quickstart/policy"
CLI = [sys.executable, "-m", "megatron_g2rpo.cli", "convert"]
ARMS = ("small export", "copy", "import", "export")


@dataclass(frozen=True)
class Cost:
    """Of one process, with those that it started.

    Attributes:
        returns: seconds until it has ended.
        on_disk: seconds until what it wrote is on the disk as well.
        processor: seconds, user and system.
        peak: resident bytes of the largest of the processes.
    """

    returns: float
    on_disk: float
    processor: float
    peak: int


def make_model(directory: Path) -> None:
    """Write the model, one tensor at a time, with the quickstart's tokenizer and processor."""
    source = directory.with_name("source")
    source.mkdir()
    weights.copy_model_files(SMALL, source)
    (source / "config.json").write_text(json.dumps(CONFIG, indent=2))
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    specs: dict[str, Tensor] = dict(model.named_parameters())
    assert sum(spec.numel() for spec in specs.values()) == PARAMETERS
    generator = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, spec in specs.items():
            yield name, torch.empty(spec.shape, dtype=spec.dtype).normal_(0, 0.02, generator=generator)

    weights.export_hf(tensors(), specs, directory, source=source, write=True, max_shard_size="2GB")


def drop_from_cache(directory: Path) -> None:
    """Drop a directory's files, which are on the disk, from the page cache."""
    for path in files(directory):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def files(directory: Path) -> list[Path]:
    """All files below a directory."""
    return [path for path in directory.rglob("*") if path.is_file()]


def measure(command: list[str], target: Path, log: Path) -> Cost:
    """Run a command that writes to ``target``.

    Raises:
        SystemExit: it failed; with what it said.
    """
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    returns = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{log.read_text()}")
    for path in files(target):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    on_disk = time.perf_counter() - start
    return Cost(returns, on_disk, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def turns(scratch: Path, rounds: int, layout: list[str], *, cached: bool) -> dict[str, list[Cost]]:
    """The costs of every arm, one a round."""
    model, checkpoint, exported, copied = (scratch / name for name in ("model", "megatron", "exported", "copied"))
    small, small_exported, log = scratch / "small", scratch / "small-exported", scratch / "log"
    measure([*CLI, "import", str(SMALL), str(small)], small, log)
    weight_files = sorted(map(str, model.glob("*.safetensors")))
    arms = {
        "small export": (small_exported, [*CLI, "export", str(small), str(small_exported), *layout]),
        "copy": (copied, ["cp", "--reflink=never", *weight_files, str(copied)]),
        "import": (checkpoint, [*CLI, "import", str(model), str(checkpoint), *layout]),
        "export": (
            exported,
            [*CLI, "export", str(checkpoint), str(exported), "--max-shard-size", "2GB", *layout],
        ),
    }
    costs: dict[str, list[Cost]] = {name: [] for name in ARMS}
    for number in range(rounds):
        pair = ("copy", "export") if number % 2 == 0 else ("export", "copy")
        for name in ("small export", "import", *pair):
            target, command = arms[name]
            shutil.rmtree(target, ignore_errors=True)
            if name == "copy":
                target.mkdir()
            os.sync()
            if not cached:
                drop_from_cache(scratch)
            costs[name].append(measure(command, target, log))
            print(f"round {number + 1}: {name}: {costs[name][-1]}", file=sys.stderr, flush=True)
        shutil.rmtree(copied)  # 4 GB less to keep while the next round writes
    return costs


def compare(model: Path, exported: Path) -> int:
    """Returns the number of tensors, all of which are equal."""
    ours, theirs = weights.SafetensorsDirectory(exported), weights.SafetensorsDirectory(model)
    assert set(ours) == set(theirs)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name
    return len(theirs)


def show(costs: dict[str, list[Cost]]) -> None:
    """Print the table: medians, with ranges of times and of the ratio to the copy of the same round."""

    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"

    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("| | returns, s | on disk, s | processor, s | to the copy: returns | to the copy: on disk | peak, GiB |")
    print("|---|---|---|---|---|---|---|")
    for name, of_arm in costs.items():
        peak = max(cost.peak for cost in of_arm)
        pairs = list(zip(of_arm, costs["copy"], strict=True))
        columns = [
            spread([cost.returns for cost in of_arm]),
            spread([cost.on_disk for cost in of_arm]),
            spread([cost.processor for cost in of_arm]),
            spread([cost.returns / copy.returns for cost, copy in pairs]),
            spread([cost.on_disk / copy.on_disk for cost, copy in pairs]),
            f"{peak / 2**30:.2f}" if peak > own else "-",
        ]
        print(f"| {name} | {' | '.join(columns)} |")


def main() -> None:
    """Make the model, measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="an existing directory; a scratch directory is made in it")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--nproc", type=int, default=1, help="processes, tensor parallel")
    parser.add_argument("--cached", action="store_true", help="leave in the page cache what is there")
    options = parser.parse_args()
    layout = []
    if options.nproc > 1:
        layout = [f"policy.megatron_cfg.tensor_model_parallel_size={options.nproc}", "--nproc", str(options.nproc)]
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="convert-") as name:
        scratch = Path(name)
        make_model(scratch / "model")
        costs = turns(scratch, options.rounds, layout, cached=options.cached)
        size = sum(path.stat().st_size for path in files(scratch / "model"))
        print(f"{size / 2**30:.2f} GiB; {compare(scratch / 'model', scratch / 'exported')} tensors are equal")
    show(costs)


if __name__ == "__main__":
    main()
