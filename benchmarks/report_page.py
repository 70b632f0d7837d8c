# SPDX-License-Identifier: Apache-2.0
"""The page of a long run: how long it takes to write, how large it is, and how soon a browser shows and obeys it.

    python -m benchmarks.report_page [--steps 200] [--rollouts 256] [--openings 5] [--keep DIRECTORY]

The run is made up: six tasks, groups of 8, answers of 60 to 100 tokens of a vocabulary of 20,000 words, 1,200 prompts
with a picture of 640 x 480 pixels, 200 metrics a step, by the writers that training uses. The browser is the headless
Chromium of ``make test-report``, in whose environment this runs. Times are of the page's own
clock, from the navigation on.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageFilter
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from megatron_g2rpo.data.shard_writer import ShardWriter
from megatron_g2rpo.records.schema import Header
from megatron_g2rpo.records.writing import RolloutWriter, table_of
from megatron_g2rpo.report.page import write_page
from megatron_g2rpo.train.run import metrics_file

TASKS = ("vqa", "grounding", "reasoning", "ocr", "math", "chart")
PARTS = {"accuracy": 0.8, "format": 0.1, "length": 0.1}
GROUP, VOCABULARY, PROMPTS = 8, 20_000, 200  # prompts of each task
TOKENS = (60, 100)
OF_TASKS = (
    *("reward", "accuracy", "format", "length", "response_tokens", "truncated", "entropy", "zero_variance_groups"),
    *("advantage_mean", "advantage_std", "advantage_q05", "advantage_q50", "advantage_q95", "advantage_skew"),
    *("advantage_normal_distance", "gradient_share", "gradient_norm", "rollout_gap_mean", "rollout_gap_max"),
    *("rollout_gap_kl", "clipped", "entropy_side", "length_above", "length_below"),
)
OF_ALL = (
    *("train/reward", "train/accuracy", "train/format", "train/length", "train/grad_norm", "train/kl", "train/loss"),
    *("train/clipped_low", "train/clipped_high", "train/rollout_gap_max", "train/rollout_gap_kl", "train/real_tokens"),
    *("train/num_tokens", "train/lr", "train/ratio", "train/entropy", "memory/peak_gb", "speed/tokens_per_second"),
    *(f"time/{phase}" for phase in ("data", "generation", "rewards", "logprobs", "update", "record", "step")),
    *(f"work/{kind}" for kind in ("tokens", "tokens_saved", "padding_tokens", "logit_tokens", "vision_patches")),
)
HELD_OUT = ("reward", "greedy_reward", "accuracy", "greedy_accuracy")
# Installed before the page's own scripts: when it says that it is ready, when its charts in sight have their lines, and
# until when tasks of more than 50 ms kept it from answering.
CLOCK = """
window.measured = {long: []};
new PerformanceObserver((list) => {
  for (const each of list.getEntries()) measured.long.push([each.startTime, each.duration]);
}).observe({type: 'longtask', buffered: true});
const inSight = () => {
  const isHigh = (each) => each.getBoundingClientRect().top < innerHeight;
  const plots = [...document.querySelectorAll('.plot')].filter(isHigh);
  return plots.length > 0 && plots.every((each) => each.querySelector('.main-svg .scatterlayer path'));
};
const watch = () => {
  if (!measured.charts && inSight()) measured.charts = performance.now();
  if (!measured.ready && document.documentElement?.dataset.ready === 'yes') measured.ready = performance.now();
  if (!measured.charts || !measured.ready) requestAnimationFrame(watch);
};
requestAnimationFrame(watch);
"""


def write_run(run: Path, steps: int, rollouts: int) -> None:
    """Write a run directory, and beside it its data and its tokenizer.

    Args:
        run: the directory.
        steps: number of steps.
        rollouts: of a step, a multiple of the group's size.
    """
    run.mkdir(parents=True)
    rng = np.random.default_rng(0)
    words = [_word(number) for number in range(VOCABULARY)]
    _write_tokenizer(run.parent / "model", words)
    _write_data(run.parent / "data", rng)
    (run / "recipe.yaml").write_text(yaml.safe_dump(_recipe(), sort_keys=False))
    writer = RolloutWriter(run, period=1, budget_mb=1e6, last_step=steps, note=print)
    for step in range(steps + 1):
        if step:
            rows, known = _step(step, steps, rollouts, words, rng)
            header = Header(
                run_id="", release="", recipe="", step=step, rollouts=rollouts, data_ranks=1, parts=tuple(PARTS)
            )
            writer.begin(table_of(rows, tuple(PARTS)), header)
            writer.finish(table_of(known, tuple(PARTS), tuple(known[0])), tuple(PARTS))
        metrics_file.append(run / metrics_file.METRICS_FILE, step, _metrics(step, steps, rng))


def _word(number: int) -> str:
    """A word of two letters or more, another one for each number; those of small numbers are short."""
    letters = ""
    while number or len(letters) < 2:
        number, letter = divmod(number, 26)
        letters += chr(97 + letter)
    return letters


def _step(
    step: int, steps: int, rollouts: int, words: list[str], rng: np.random.Generator
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    known: list[dict[str, Any]] = []
    for group in range(rollouts // GROUP):
        task = TASKS[group % len(TASKS)]
        key = f"shard-000000/train-{TASKS.index(task) * PROMPTS + int(rng.integers(PROMPTS)):06d}"
        accuracies = rng.random(GROUP) < 0.3 + 0.4 * step / steps
        rewards = 0.8 * accuracies + 0.1 + 0.1 * rng.random(GROUP)
        for sample in range(GROUP):
            tokens = int(rng.integers(*TOKENS))
            # As text has them: few words often, many rarely.
            ids = np.minimum(rng.zipf(1.3, tokens), VOCABULARY - 1).astype(np.int32)
            logprobs = np.log(rng.beta(5.0, 1.0, tokens)).astype(np.float32)
            text = " ".join(words[each] for each in ids)
            rows.append(
                {
                    "step": step,
                    "update": 0,
                    "weights_version": step - 1,
                    "data_rank": 0,
                    "task": task,
                    "prompt_key": key,
                    "group_id": group,
                    "sample_index": sample,
                    "prompt_text": f"<image>{text[:200]}?",
                    "question": f"<image>What is {key}?",
                    "reference": "[100, 90, 300, 400]" if task == "grounding" else words[ids[0]],
                    "answer_format": "box_iou" if task == "grounding" else "exact",
                    "images": [f"{key}#0"],
                    "image_widths": [640],
                    "image_heights": [480],
                    "response_text": text,
                    "well_formed": True,
                    "response_ids": ids,
                    "answer": f"[100, 90, {300 + sample}, 400]" if task == "grounding" else words[ids[-1]],
                    "behaviour_logprobs": logprobs,
                    "reward": float(rewards[sample]),
                    "reward_accuracy": float(accuracies[sample]),
                    "reward_format": 1.0,
                    "reward_length": float(rng.random()),
                    "truncated": False,
                    "engine": "vllm",
                    "seconds": 20.0,
                }
            )
            noise = rng.normal(0.0, 0.01, tokens).astype(np.float32)
            entropies = rng.gamma(1.0, 0.4, tokens).astype(np.float32)
            advantage = float((rewards[sample] - rewards.mean()) / rewards.std())
            known.append({"advantage": advantage, "old_logprobs": logprobs + noise, "entropies": entropies})
    return rows, known


def _metrics(step: int, steps: int, rng: np.random.Generator) -> dict[str, float]:
    risen = 0.4 + 0.4 * step / steps
    metrics: dict[str, float] = {}
    if step:
        names = [*OF_ALL, *(f"train/{task}/{name}" for task in TASKS for name in OF_TASKS)]
        metrics |= {name: float(risen + 0.05 * rng.normal()) for name in names}
    if step % max(1, steps // 4) == 0:
        places = [*(f"{task}/" for task in TASKS), "mean_"]
        metrics |= {f"val/{place}{name}": risen for place in places for name in HELD_OUT}
    return metrics


def _recipe() -> dict[str, Any]:
    length = {"start": 20, "peak_start": 60, "peak_end": 90, "end": 200}
    return {
        "grpo": {"adv_estimator": {"name": "g2rpo"}},
        "loss_fn": {"entropy_shaping": {"enabled": False}},
        "policy": {"model_name": "model"},
        "data": {"train": {"path": "data"}, "validation": None},
        "env": {"reward_weights": PARTS, "default_task": {"length": length}, "tasks": {task: {} for task in TASKS}},
    }


def _write_data(directory: Path, rng: np.random.Generator) -> None:
    """Pictures that are about as hard to compress as photographs: shapes, shades and grain."""
    with ShardWriter(directory) as writer:
        for number in range(len(TASKS) * PROMPTS):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480))
            draw = ImageDraw.Draw(coarse)
            for _ in range(25):
                x, y, width, height = (int(each) for each in rng.integers((0, 0, 10, 10), (600, 440, 160, 160)))
                draw.ellipse((x, y, x + width, y + height), fill=tuple(int(each) for each in rng.integers(0, 256, 3)))
            grain = rng.normal(0.0, 6.0, (480, 640, 1))
            blurred = np.asarray(coarse.filter(ImageFilter.GaussianBlur(1)), dtype=np.float64)
            file = io.BytesIO()
            Image.fromarray(np.clip(blurred + grain, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
            task = TASKS[number // PROMPTS]
            boxed = task == "grounding"
            fields = {
                "task": task,
                "question": "<image>What is it?",
                "answer": "[100, 90, 300, 400]" if boxed else "it",
                "answer_format": "box_iou" if boxed else "exact",
            }
            writer.write(f"train-{number:06d}", fields, [file.getvalue()])


def _write_tokenizer(directory: Path, words: list[str]) -> None:
    directory.mkdir()
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))


def opened(page: Path, openings: int) -> dict[str, float]:
    """Return the medians over openings of a page, each in a browser that was just started, in milliseconds."""
    from tests.report.browser import Browser

    found: list[dict[str, float]] = []
    for _ in range(openings):
        with tempfile.TemporaryDirectory() as profile, Browser(Path(profile)) as browser:
            browser.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": CLOCK})
            browser.driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
            browser.open(page.resolve().as_uri())
            browser.until("measured.charts && measured.ready")
            metrics = browser.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
            time.sleep(1.0)
            navigation = browser.value("performance.getEntriesByType('navigation')[0].toJSON()")
            paint = browser.value("performance.getEntriesByName('first-contentful-paint')[0].startTime")
            measured = browser.value("measured")
            busy = measured["long"]
            found.append(
                {
                    "first paint": paint,
                    "load event": navigation["loadEventEnd"],
                    "charts in sight": measured["charts"],
                    "samples and all the rest": measured["ready"],
                    "last long task ends": max((start + length for start, length in busy), default=0.0),
                    "longest task": max((length for _, length in busy), default=0.0),
                    # Of the one thread that a page has, until it is ready: what a machine that does nothing else shows.
                    "processor's time": 1000
                    * next(each["value"] for each in metrics if each["name"] == "TaskDuration"),
                }
            )
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rollouts", type=int, default=256, help="of a step, a multiple of 8")
    parser.add_argument("--openings", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="directory that the run is made in, or taken from if it is there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = (options.keep or Path(folder)) / "run"
        if not run.exists():
            write_run(run, options.steps, options.rollouts)
        recorded = sum(path.stat().st_size for path in (run / "rollouts").iterdir())
        start = time.perf_counter()
        page = write_page([run])
        seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"records: {recorded / 1e6:.1f} MB in {len(list((run / 'rollouts').iterdir()))} files")
        print(f"page: {page.stat().st_size / 1e6:.2f} MB, written in {seconds:.1f} s, peak memory {peak / 1e6:.2f} GB")
        print(f"opened {options.openings} times, medians in ms, load {os.getloadavg()[0]:.1f}:")
        print(json.dumps({name: round(value) for name, value in opened(page, options.openings).items()}, indent=1))


if __name__ == "__main__":
    main()
