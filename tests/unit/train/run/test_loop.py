# SPDX-License-Identifier: Apache-2.0
"""Claims: an error that ends a run loses no checkpoint; a resumed run knows how long a checkpoint takes; a deadline
that leaves no time for a step is an error; a validation without rewards is none.
"""

from __future__ import annotations

import errno
import math
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.train.run import checkpoint_writing, loop
from megatron_g2rpo.train.run.signals import StopRequest
from megatron_g2rpo.train.run.slurm_time import SLURM_END
from megatron_g2rpo.train.run.stopping import RunStopped, SamplingStopped, Stopping
from megatron_g2rpo.train.run.validation import Validation
from tests.unit.train.run.checkpoint_cases import Notes, make_model, make_policy, make_run, names_in

ASYNC = "checkpointing.async_save=true"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> MegatronPolicy:
    return make_policy(make_model(tmp_path_factory.mktemp("model")))


class SlowDisk:
    """Takes a while for the tensors of a checkpoint, seconds; then refuses them, if it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self._write, self.seconds = checkpoint_writing._write_bucket, seconds
        self.error: OSError | None = None
        monkeypatch.setattr(checkpoint_writing, "_write_bucket", self.write)

    def write(self, **keywords: Any) -> None:
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        self._write(**keywords)


def end_with_a_bad_update(run: loop.Run, guard: Any, policy: MegatronPolicy, notes: Notes) -> None:
    def body() -> None:
        with run.naming_checkpoints(notes.log):
            run.save(1)
            assert guard.skips(1.0, math.nan)
            guard.settle(2, 0, list, group=policy.groups.data, note=notes.note)

    with pytest.raises(FloatingPointError, match="step 2: the gradient's norm is nan"):
        body()


def test_an_error_that_ends_the_run_leaves_the_checkpoint_under_way_with_its_name(
    policy: MegatronPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SlowDisk(monkeypatch, 0.5)
    run, guard = make_run(tmp_path, policy, Stopping(None, StopRequest(), {}), ASYNC)
    end_with_a_bad_update(run, guard, policy, notes := Notes())
    assert names_in(tmp_path / "checkpoints") == ["step_1"]
    assert notes.lines == []


def test_an_error_of_one_rank_alone_waits_for_no_other(
    policy: MegatronPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are in a collective that this rank does not join."""
    SlowDisk(monkeypatch, 0.5)
    monkeypatch.setattr(loop, "is_on_all_ranks", lambda error: False)  # true of one process, of which there is one here
    run, guard = make_run(tmp_path, policy, Stopping(None, StopRequest(), {}), ASYNC)
    end_with_a_bad_update(run, guard, policy, Notes())
    assert names_in(tmp_path / "checkpoints") == ["step_1.partial"]
    run._checkpoints.finish()


def test_what_ended_the_run_is_raised_where_the_checkpoint_fails_too(
    policy: MegatronPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SlowDisk(monkeypatch, 0.1).error = OSError(errno.ENOSPC, "")
    run, guard = make_run(tmp_path, policy, Stopping(None, StopRequest(), {}), ASYNC)
    end_with_a_bad_update(run, guard, policy, notes := Notes())
    [line] = notes.lines
    assert line.startswith("warning: rank 0 could not write ")
    assert "No space left on device" in line
    assert names_in(tmp_path / "checkpoints") == []


def test_trackers_are_told_the_end_before_the_page_is_waited_for(
    policy: MegatronPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page may take minutes, in which a tracker would show a run that hangs, and one that is killed as failed."""
    run, _ = make_run(tmp_path, policy, Stopping(None, StopRequest(), {}))
    order: list[str] = []
    monkeypatch.setattr(
        run, "_log", SimpleNamespace(enabled=False, complete=lambda: order.append("trackers"), note=order.append)
    )
    monkeypatch.setattr(run, "_exported", lambda: order.append("export"))  # which may fail, and is the run's
    monkeypatch.setattr(run, "_page", SimpleNamespace(finish=lambda: order.append("page")))
    run.finish()
    assert order == ["export", "trackers", "page"]


@pytest.mark.parametrize("keys", [(), (ASYNC,)], ids=["sync", "async"])
def test_a_resumed_run_leaves_the_time_that_a_checkpoint_takes_before_a_deadline(
    policy: MegatronPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: tuple[str, ...]
) -> None:
    """Its first save is as long as the last of the process before, and may be longer than what is left for any."""
    disk = SlowDisk(monkeypatch, 0.5)
    first, _ = make_run(tmp_path, policy, Stopping(None, StopRequest(), {}), *keys)
    first.save(1)
    first._checkpoints.finish()
    disk.seconds = 0.0
    stopping = Stopping(None, StopRequest(), {})
    make_run(tmp_path, policy, stopping, *keys)
    assert stopping._longest_save >= 0.5
    anew = Stopping(None, StopRequest(), {})
    make_run(tmp_path / "other", policy, anew, *keys)
    assert anew._longest_save == 0.0, "negative: of a new run nothing is known"


def test_steps_that_are_missing_in_the_metrics_are_said_and_one_that_a_stop_left_is_not(
    policy: MegatronPolicy, tmp_path: Path
) -> None:
    (tmp_path / "identity.yaml").write_text("run_id: mine\n")
    metrics = tmp_path / "metrics.jsonl"
    run, _ = make_run(tmp_path, policy, Stopping(None, StopRequest(), {}))
    for step, unlogged in ((3, {}), (4, {"unlogged": {"train/loss": 1.0}})):
        run._write(step, {**run._state(), **unlogged})
    assert (tmp_path / ".saved").read_text() == "4\n"
    metrics.write_text("".join(f'{{"step": {step}}}\n' for step in range(4)))
    whole, _ = make_run(tmp_path, policy, Stopping(None, StopRequest(), {}))
    assert (whole.first_step, whole.logged_step, whole._notes) == (4, 3, [])
    metrics.write_text('{"step": 1}\n')
    cut, _ = make_run(tmp_path, policy, Stopping(None, StopRequest(), {}))
    [note] = cut._notes
    assert note.startswith(f"warning: {metrics} has no line of step 3 and 1 more of the steps before, which the")


LIMITS = {
    "recipe": (
        lambda: Stopping("0:0:0:0", StopRequest(), {}),
        "checkpointing.checkpoint_must_save_by",
        "set it to more",
    ),
    "slurm": (
        lambda: Stopping(None, StopRequest(), {SLURM_END: str(int(time.time()) + 30)}),
        rf"the end of the Slurm job \({SLURM_END}\)",
        "submit the job with a longer time limit",
    ),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_a_time_limit_that_is_over_before_a_step_is_taken_ends_the_run_for_good(
    policy: MegatronPolicy, tmp_path: Path, limit: str
) -> None:
    """It would be over each time: a job that is queued again for every stop would be so for ever."""
    stopping, name, todo = LIMITS[limit]
    new, _ = make_run(tmp_path, policy, stopping(), "grpo.val_at_start=false")
    with pytest.raises(
        RunStopped, match=rf"^stopped by {name} \d+ s after the start, .* no step .*: {todo}$"
    ) as raised:
        new.begin(Notes().log)
    assert not raised.value.resumable
    with pytest.raises(RunStopped) as raised, new.sampling(1):
        raise SamplingStopped(str(stopping().asked()))
    assert not raised.value.resumable, "nor does a first step that takes longer get on"
    new.save(1)
    with pytest.raises(RunStopped, match=f"^stopped by {name} after step 1, saved in ") as raised:
        new.stop_if_asked(1)
    assert raised.value.resumable, "negative: with a step taken, the next process goes on behind it"
    resumed, _ = make_run(tmp_path, policy, stopping())
    with pytest.raises(RunStopped, match="no step taken since") as raised:
        resumed.begin(Notes().log)
    assert not raised.value.resumable


def test_a_signal_before_the_first_step_loses_nothing_whatever_the_deadline(
    policy: MegatronPolicy, tmp_path: Path
) -> None:
    """The run may be moved elsewhere, where it has more time."""
    request = StopRequest()
    run, _ = make_run(tmp_path, policy, Stopping("0:0:0:0", request, {}), "grpo.val_at_start=false")
    request.received(signal.SIGTERM)
    with pytest.raises(RunStopped, match="stopped by SIGTERM before the first step") as raised:
        run.begin(Notes().log)
    assert raised.value.resumable


def test_one_validation_without_rewards_is_told_and_ranks_behind(
    policy: MegatronPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge that is down for a while; the steps are logged and saved all the same."""
    run, _ = make_run(tmp_path, policy, Stopping(None, StopRequest(), {}), "checkpointing.metric_name=val/mean_reward")
    engine = SimpleNamespace(load_weights=lambda source: None, release=lambda: None)
    monkeypatch.setattr(run, "_components", SimpleNamespace(**vars(run._components), engine=engine))
    found = {"val/mean_reward": 0.5}
    monkeypatch.setattr(loop, "validate", lambda *_: Validation(dict(found), [], [], []))
    notes = Notes()
    run._validate(0, notes.log)
    assert run._metrics == found
    assert not [line for line in notes.lines if "warning" in line]
    found = {"val/failed_rewards": 2.0}
    run._validate(0, notes.log)
    assert run._metrics == found, "not those of a policy before"
    [line] = [line for line in notes.lines if "warning" in line]
    assert "this validation has no val/mean_reward" in line
