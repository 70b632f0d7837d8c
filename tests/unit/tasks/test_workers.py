# SPDX-License-Identifier: Apache-2.0
"""Claims: parts in worker processes say what they say here, and one that hangs or crashes costs its response alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

from megatron_g2rpo.recipe import Env
from megatron_g2rpo.recipe.imports import import_all
from megatron_g2rpo.tasks import workers as module
from megatron_g2rpo.tasks.scoring import RewardError, Scoring
from megatron_g2rpo.tasks.workers import RewardWorkers
from megatron_g2rpo.types import Rewards, Rollout
from tests.unit.tasks.common import make_env, make_rollout

# What a user's file does to a run.
PARTS = """
import os, signal, sys, time
from pathlib import Path
from megatron_g2rpo.extend import reward_part

class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no message")

def said(response):
    return response.text.partition(" ")[0]

@reward_part("w_misbehaves")
def misbehaves(sample, response, *, note: str = ""):
    what = said(response)
    if what == "hang":
        time.sleep(600)
    if what == "exit":
        os._exit(3)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "eats":
        bytearray(1 << 60)
    if what == "raise":
        raise ValueError("as asked")
    if what == "leave":
        sys.exit(4)
    if what == "interrupt":
        raise KeyboardInterrupt
    if what == "mute":
        raise Mute
    if what == "prints":
        print("x" * (1 << 20))
    if what == "nan":
        return float("nan")
    if what == "slow":
        time.sleep(0.3)
    return len(response.text) / 10

@reward_part("w_pid")
def pid(sample, response):
    return float(os.getpid())

@reward_part("w_option")
def option(sample, response, *, scale: float = 1.0):
    return scale

@reward_part("w_looks")
def looks(sample, response):
    try:
        return sum(image.size[0] for image in sample.images)
    except Exception:
        return -1.0

@reward_part("w_counts")
def counts(sample, response):
    return float(len(sample.images))

@reward_part("w_judges", batched=True)
def judges(samples, responses):
    if any(said(response) == "hang-batch" for response in responses):
        time.sleep(600)
    return [
        ValueError("no verdict") if said(response) == "none" else len(samples) + sample.images[0].size[1]
        for sample, response in zip(samples, responses)
    ]
"""
TIMEOUT_S = 1.5


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    file = tmp_path_factory.mktemp("parts") / "parts.py"
    file.write_text(PARTS)
    import_all([str(file)], None)
    return [str(file)]


@pytest.fixture(scope="module")
def workers(imports: list[str]) -> Iterator[RewardWorkers]:
    workers = RewardWorkers(
        2, imports=imports, options={"w_option": {"scale": 0.25}}, timeout_s=TIMEOUT_S, batch_timeout_s=TIMEOUT_S
    )
    workers.start()
    yield workers
    workers.close()


@pytest.fixture
def no_process_is_left() -> None:
    """Not so here: ``workers`` outlive a test, and replace those that it has ended."""


def scored(
    rollouts: list[Rollout], env: Env, workers: RewardWorkers | None, most_failures: int | None = None
) -> Rewards:
    scoring = Scoring(env, response_format="thinking_answer", max_response_tokens=99, workers=workers)
    return scoring.rewards(rollouts, most_failures=most_failures)


def test_workers_say_what_this_process_says(workers: RewardWorkers) -> None:
    """For every part of ours, every response of a hundred, in their order; parts run elsewhere."""
    texts = ["<thinking>a</thinking><answer>12</answer>", "<answer>12</answer>", "12", "<answer>[1, 2]</answer>"]
    rollouts = [make_rollout(texts[n % 4] + " " * n, num_tokens=n + 1, key=f"s/{n // 8}") for n in range(100)]
    env = make_env({"accuracy": 0.9, "format": 0.1, "structure": 0.2, "length": 0.3, "w_misbehaves": 0.7})
    ours, theirs = scored(rollouts, env, None), scored(rollouts, env, workers)
    assert torch.equal(ours.total, theirs.total)
    assert all(torch.equal(ours.parts[name], theirs.parts[name]) for name in ours.parts)
    assert not theirs.failures
    pids = set(scored(rollouts, make_env({"w_pid": 1.0}), workers).total.tolist())
    assert float(os.getpid()) not in pids
    assert scored(rollouts[:1], make_env({"w_option": 1.0}), workers).total.item() == 0.25


def test_what_goes_wrong_in_one_response_costs_that_response_alone(workers: RewardWorkers) -> None:
    texts = ["good", "hang", "fine", "exit", "raise", "nan", "crash", "eats", "better"]
    rewards = scored(
        [make_rollout(text, key=f"s/{text}") for text in texts],
        make_env({"format": 0.0, "w_misbehaves": 1.0, "w_counts": 1.0}),
        workers,
    )
    assert [texts[row] for row in range(9) if not rewards.failed[row]] == ["good", "fine", "better"]
    assert rewards.total[[0, 2, 8]].tolist() == [0.4, 0.4, 0.6]
    messages = {texts[row]: failed.message for row, failed in rewards.failures.items()}
    assert "had not returned after 1.5 s, its time limit, and was killed" in messages["hang"]
    assert "ended its worker process with exit code 3" in messages["exit"]
    assert f"ended its worker process with exit code {-signal.SIGSEGV}" in messages["crash"]
    assert "ValueError: as asked" in messages["raise"]
    assert "returned nan" in messages["nan"]
    assert "MemoryError" in messages["eats"]
    for text, message in messages.items():
        assert message.startswith(f"reward w_misbehaves of sample s/{text}, task 'math', response 3: ")


@pytest.mark.parametrize("here", [False, True])
def test_a_part_that_would_end_the_process_ends_no_run(workers: RewardWorkers, here: bool) -> None:
    texts = ["good", "leave", "mute", *(["interrupt", "prints"] if not here else [])]  # here, it is a Ctrl-C
    rollouts = [make_rollout(text, key=text) for text in texts]
    rewards = scored(rollouts, make_env({"w_misbehaves": 1.0}), None if here else workers)
    said = {texts[row]: failed.message.partition("response 3: ")[2] for row, failed in rewards.failures.items()}
    assert said.pop("leave") == "raised SystemExit: 4"
    assert said.pop("mute") == "raised Mute: (its message cannot be made a text)"
    assert said == ({} if here else {"interrupt": "raised KeyboardInterrupt: "})


def test_processes_that_never_start_are_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "hangs.py"
    file.write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(module, "START_LIMIT_S", 1.0)
    workers = RewardWorkers(1, imports=[str(file)], options={}, timeout_s=TIMEOUT_S, batch_timeout_s=TIMEOUT_S)
    with pytest.raises(RuntimeError, match=r"had not started after 1 s: does a file of the recipe's imports hang"):
        scored([make_rollout("good")], make_env({"format": 1.0}), workers)
    workers.close()


def test_many_slow_responses_are_not_one_that_hangs(workers: RewardWorkers) -> None:
    """Together they take longer than the limit of a call, each of them does not."""
    rollouts = [make_rollout("slow") for _ in range(16)]
    assert TIMEOUT_S < 16 * 0.3 / 2
    assert not scored(rollouts, make_env({"w_misbehaves": 1.0}), workers).failures


def test_images_are_sent_to_parts_that_look_at_them(imports: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    dumps = module.pickle.dumps
    monkeypatch.setattr(module.pickle, "dumps", lambda value: sizes.append(len(dumps(value))) or dumps(value))
    workers = RewardWorkers(1, imports=imports, options={}, timeout_s=TIMEOUT_S, batch_timeout_s=TIMEOUT_S)
    image = Image.new("RGB", (640, 480))
    rollouts = [make_rollout("", images=(image,))] * 2
    try:
        assert scored(rollouts, make_env({"w_counts": 1.0}), workers).total.tolist() == [1.0, 1.0]
        assert max(sizes) < 10_000, "their number is known without them"
        assert scored(rollouts, make_env({"w_looks": 1.0}), workers).total.tolist() == [640.0, 640.0]
        assert sizes[-1] > 640 * 480 * 3
        assert sizes[-1] < 2 * 640 * 480 * 3, "once a sample, not once a response"
        scored(rollouts, make_env({"w_looks": 1.0}), workers)
        assert [size > 10_000 for size in sizes] == [False, False, True, True], "it is asked without them once"
    finally:
        workers.close()


def test_a_batched_part_is_one_call_with_a_limit_of_its_own(workers: RewardWorkers) -> None:
    image = Image.new("RGB", (8, 5))
    rollouts = [make_rollout(text, images=(image,), key=f"s/{text}") for text in ("a", "none", "b")]
    rewards = scored(rollouts, make_env({"w_judges": 1.0, "format": 0.0}), workers)
    assert rewards.failed.tolist() == [False, True, False]
    assert rewards.total[[0, 2]].tolist() == [8.0, 8.0]
    assert "sample s/none" in rewards.failures[1].message
    assert "ValueError: no verdict" in rewards.failures[1].message
    hanging = [make_rollout(text, images=(image,)) for text in ("hang-batch", "a")]
    rewards = scored(hanging, make_env({"w_judges": 1.0, "format": 0.0}), workers)
    assert rewards.failed.tolist() == [True, True]
    assert "time limit, and was killed (asked for 2 responses at once)" in rewards.failures[1].message


def test_what_is_added_early_is_scored_alike(workers: RewardWorkers) -> None:
    rollouts = [make_rollout("x" * n, images=(Image.new("RGB", (3, 2)),)) for n in range(20)]
    env = make_env({"format": 1.0, "w_misbehaves": 1.0, "w_judges": 1.0})
    scoring = Scoring(env, response_format="thinking_answer", max_response_tokens=99, workers=workers)
    for start in (15, 0, 5):  # some of them, out of order
        scoring.add(rollouts[start : start + 5])
    scoring.add([make_rollout("raise")])  # of a generation that was begun anew
    early, late = scoring.rewards(rollouts), scored(rollouts, env, workers)
    assert torch.equal(early.total, late.total)
    assert not early.failures


def test_a_run_in_which_everything_hangs_ends_soon(imports: list[str]) -> None:
    workers = RewardWorkers(2, imports=imports, options={}, timeout_s=2.0, batch_timeout_s=2.0)
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"(?s)more than env.max_failed_rewards.*w_misbehaves 3.*time limit"):
        scored([make_rollout("hang") for _ in range(500)], make_env({"w_misbehaves": 1.0}), workers, most_failures=2)
    assert time.monotonic() - start < 200.0, "500 limits of two workers would be 500 s"
    assert scored([make_rollout("good")], make_env({"w_misbehaves": 1.0}), workers).total.item() == 0.4, "a new pool"
    workers.close()


def test_workers_end_with_a_process_that_is_killed(imports: list[str], tmp_path: Path) -> None:
    """Also one in the middle of a call that would hang for long."""
    program = tmp_path / "program.py"
    program.write_text(f"""
from megatron_g2rpo.tasks.workers import RewardWorkers
from megatron_g2rpo.tasks.scoring import Scoring
from megatron_g2rpo.recipe.imports import import_all
from tests.unit.tasks.common import make_env, make_rollout
if __name__ == "__main__":
    import_all({imports!r}, None)
    workers = RewardWorkers(1, imports={imports!r}, options={{}}, timeout_s=500, batch_timeout_s=500)
    keywords = dict(response_format="plain", max_response_tokens=9, workers=workers)
    print(int(Scoring(make_env({{"w_pid": 1.0}}), **keywords).rewards([make_rollout("a")]).total.item()), flush=True)
    Scoring(make_env({{"w_misbehaves": 1.0}}), **keywords).rewards([make_rollout("hang")])
""")
    root = Path(__file__).resolve().parents[3]
    with subprocess.Popen(
        [sys.executable, str(program)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        worker = psutil.Process(int(process.stdout.readline()))
        time.sleep(0.5)  # the call that hangs has begun
        assert worker.is_running()
        process.kill()
    psutil.wait_procs([worker], timeout=10)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
