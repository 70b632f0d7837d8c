# SPDX-License-Identifier: Apache-2.0
"""The run directory belongs to one recipe and one live job: it is claimed, continued or refused before the loop starts.

Nothing is removed or continued here that is another run's, see ``owners``.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.recipe import Recipe
from megatron_g2rpo.train.run import metrics_file
from megatron_g2rpo.train.run.files import check_writable, replace_bytes
from megatron_g2rpo.train.run.fresh import set_aside
from megatron_g2rpo.train.run.lock import LOCK_FILE, Lock
from megatron_g2rpo.train.run.metrics_file import METRICS_FILE
from megatron_g2rpo.train.run.model_fingerprint import model_fingerprint
from megatron_g2rpo.train.run.owners import (
    CHECKPOINT_DIR,
    IDENTITY_FILE,
    LOG_DIR,
    RUN_ID,
    RunDirectoryError,
    different,
    first_line,
    is_unclaimed,
    owners_of,
    read_identity,
    refuse_within_live,
    steps_in,
)
from megatron_g2rpo.train.run.saved_record import last_saved, record_saved

RECIPE_FILE = "recipe.yaml"
SHOWN_DIFFERENCES = 5
# Of the keys of a recipe; releases up to 0.1 wrote none.
_VERSION, VERSION = "identity_version", 2
_MODEL = "model_fingerprint"
_NEW_OF_TASKS = ("response_format", "reward_weights")
# Seconds that a job which Slurm has queued again waits for its earlier self: nobody starts the command again, and a
# file server holds the lock of a node that was lost until its lease is over.
REQUEUED_WAIT_S, _RESTARTS = 180.0, "SLURM_RESTART_COUNT"


@contextmanager
def claimed(recipe: Recipe, *, fresh: bool) -> Iterator[list[str]]:
    """Claim the run directory for a recipe, and hold it; one process of a job does, from before the loop to its end.

    An empty or new directory is claimed, and so is one that an attempt left without a result. One of the same recipe
    (layout, logging and length of the run aside) is continued. ``fresh`` renames what an earlier run left; nothing is
    deleted, and where a directory is refused nothing was written.

    Yields:
        Lines for the user: which keys the continuation has changed, of those that it may change.

    Raises:
        DirectoryInUseError: another job is at work in the run directory or in ``checkpointing.checkpoint_dir``, or in
            a run directory around one of them; with ``fresh``, also in a directory within.
        RunDirectoryError: the directory belongs to another recipe (the keys that differ are named), holds files that
            are no run's, or has results that this run could only overwrite; ``checkpointing.checkpoint_dir`` holds the
            checkpoints of another run.
        MetricsFileError: ``metrics.jsonl`` is damaged; names the line.
        OSError: a directory cannot be written to; names its key.
    """
    places = _places(recipe)
    refuse_within_live(places)
    if fresh:
        set_aside(recipe)
    with ExitStack() as held:

        def lock(key: str) -> None:
            locks[key] = held.enter_context(Lock(places[key], key, wait_s=wait_s))

        locks: dict[str, Lock] = {}
        wait_s = REQUEUED_WAIT_S if _is_requeued() else 0.0
        for key in places:
            if (places[key] / LOCK_FILE).exists():
                lock(key)
        identity = {**recipes.identity(recipe), _MODEL: model_fingerprint(recipe.policy.model_name)}
        claim = _checked(recipe, identity)
        for key in places:
            if key not in locks:
                lock(key)
            locks[key].say(claim.run_id)
            check_writable(places[key], key)
        whole = {**identity, _VERSION: VERSION, RUN_ID: claim.run_id}
        directory = places[LOG_DIR]
        replace_bytes(directory / IDENTITY_FILE, yaml.safe_dump(whole, sort_keys=True).encode())
        record_saved(directory, claim.last_saved)
        replace_bytes(directory / RECIPE_FILE, recipes.dump(recipe).encode())
        for each in locks.values():
            each.share()
        yield [*claim.notes, *(each.note for each in locks.values() if each.note)]


@contextmanager
def joined(recipe: Recipe) -> Iterator[None]:
    """Hold the run directory together with the launcher that has claimed it; the first rank of its job does.

    Raises:
        DirectoryInUseError: the launcher is gone, and another job has claimed the directory.
    """
    with ExitStack() as held:
        for key, place in _places(recipe).items():
            held.enter_context(Lock(place, key, shared=True))
        yield


def _is_requeued() -> bool:
    """Whether Slurm has queued the job again, by the count that it sets; what is none was not set by Slurm."""
    count = os.environ.get(_RESTARTS, "")
    return count.isascii() and count.isdecimal() and int(count) > 0


@dataclass(frozen=True)
class _Claim:
    """What a run that may start finds: its id, lines for the user, and the step of its newest checkpoint."""

    run_id: str
    notes: tuple[str, ...] = ()
    last_saved: int = 0


def _places(recipe: Recipe) -> dict[str, Path]:
    """The directories that a run writes to, by the keys that name them."""
    places = {LOG_DIR: Path(recipe.logger.log_dir)}
    if recipe.checkpointing.enabled:
        places[CHECKPOINT_DIR] = Path(recipe.checkpointing.checkpoint_dir)
    return different(places)


def _checked(recipe: Recipe, identity: Mapping[str, Any]) -> _Claim:
    """Say what a run goes on from, or why it may not; nothing is written."""
    directory, checkpoints = Path(recipe.logger.log_dir), Path(recipe.checkpointing.checkpoint_dir)
    saved = steps_in(checkpoints)
    if not (directory / IDENTITY_FILE).exists():
        if not is_unclaimed(directory):
            raise RunDirectoryError(
                f"{LOG_DIR}: {directory} holds files, but no {IDENTITY_FILE}: it is not a run directory; name another"
            )
        if saved:
            raise RunDirectoryError(
                f"{CHECKPOINT_DIR}: {checkpoints} holds checkpoints, but {directory} is a new run directory; "
                f"name another for either{_or_fresh(owners_of(saved))}"
            )
        return _Claim(uuid.uuid4().hex)
    before = read_identity(directory)
    known = before.pop(RUN_ID, None)
    if not saved and not (directory / METRICS_FILE).exists() and not last_saved(directory):
        return _Claim(uuid.uuid4().hex)  # an attempt without a result owns nothing
    for theirs, names in owners_of(saved).items():
        if theirs != known:
            mine = f"run {known}" if known else "another"
            raise RunDirectoryError(
                f"{CHECKPOINT_DIR}: {checkpoints} holds checkpoints of run {theirs} ({', '.join(names)}), and "
                f"{directory} belongs to {mine}; set the key to a directory of this run's own"
            )
    _check_same(identity, before, directory)
    return _Claim(known or uuid.uuid4().hex, tuple(_continued(recipe, saved)), max(saved, default=0))


def _continued(recipe: Recipe, saved: Mapping[int, Path]) -> Iterator[str]:
    """Iterate over what the user must know of a run that goes on, or raise if it would only lose what it has."""
    directory, checkpoints = Path(recipe.logger.log_dir), Path(recipe.checkpointing.checkpoint_dir)
    logged = metrics_file.last_step(directory / METRICS_FILE)
    if not recipe.checkpointing.enabled and (saved or logged):
        instead = f"; or go on from step {max(saved)} with checkpointing.enabled=true" if saved else ""
        steps = max([logged, *saved])
        raise RunDirectoryError(
            f"{LOG_DIR}: {directory} holds {steps} steps of a run, which would be lost: with "
            f"checkpointing.enabled=false nothing is continued. Pass --fresh to move them aside{instead}"
        )
    before, note = _read_recipe(directory / RECIPE_FILE)
    yield from note
    if not saved and (logged or last_saved(directory)):
        elsewhere = Path(str(before.get(CHECKPOINT_DIR, checkpoints)))
        if elsewhere != checkpoints and steps_in(elsewhere):
            raise RunDirectoryError(
                f"{CHECKPOINT_DIR}: {checkpoints} holds no checkpoints, those of this run are in {elsewhere}; set the "
                "key to where they are, or pass --fresh to move the run aside and start anew"
            )
        _check_none_was_saved(directory, elsewhere, logged, before)
        yield f"no checkpoint was saved: the run starts anew and takes its {logged} logged steps again"
    yield from _changed(recipe, before)


def _check_none_was_saved(directory: Path, checkpoints: Path, logged: int, before: Mapping[str, Any]) -> None:
    """Raise if a run of which no checkpoint is there has saved one: its steps would be lost, with their metrics.

    Args:
        directory: the run directory.
        checkpoints: where the run saved them.
        logged: the last step in its ``metrics.jsonl``.
        before: the settings that it had; empty where they are not known.
    """
    last = last_saved(directory)
    if last is None:  # of a run of an earlier release, what it would have saved by then
        period = before.get("checkpointing.save_period")
        end = before.get("grpo.max_num_steps", before.get("sft.max_num_steps"))
        if isinstance(period, int) and isinstance(end, int) and logged < min(period, end):
            return
        why = f"the run has logged {logged} steps, and will have saved one"
    elif last > 0:
        why = f"the run had saved step_{last}"
    else:
        return
    raise RunDirectoryError(
        f"{CHECKPOINT_DIR}: {checkpoints} holds no checkpoint, but {why}: it would begin at step 0, and its metrics in "
        f"{directory} be lost; restore a checkpoint, or pass --fresh to move the run aside and start anew"
    )


def _changed(recipe: Recipe, theirs: Mapping[str, Any]) -> Iterator[str]:
    """Say which keys differ from those that the run had before; all may."""
    mine = recipes.settings(recipe)
    keys = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)) if theirs else []
    if keys:
        shown = "; ".join(f"{key}: {theirs.get(key)} before, {mine.get(key)} now" for key in keys[:SHOWN_DIFFERENCES])
        more = f" and {len(keys) - SHOWN_DIFFERENCES} more" if len(keys) > SHOWN_DIFFERENCES else ""
        yield f"the run goes on with other settings ({shown}{more})"


def _read_recipe(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that a run had before, which nothing but messages depends on, and lines for the user."""
    if not path.exists():
        return {}, []
    try:
        return recipes.flatten(dict(yaml.safe_load(path.read_text()))), []
    except (yaml.YAMLError, ValueError, TypeError) as error:
        return {}, [f"{path} is damaged ({first_line(error)}) and written anew; which settings changed is not known"]


def _or_fresh(owners: Mapping[str, Any]) -> str:
    """An advice that is none where the checkpoints are another run's."""
    if owners:
        return f" (they are those of run {', '.join(owners)})"
    return ", or pass --fresh to move the checkpoints aside"


def _check_same(mine: Mapping[str, Any], theirs: Mapping[str, Any], directory: Path) -> None:
    known = mine.keys() | theirs.keys()
    if theirs.get(_VERSION) != VERSION:
        # Keys that a release up to 0.1 did not have, or had otherwise; tasks and weights it named as today's do.
        tasks = {key for key in known if key.startswith("env.tasks.") and key.rpartition(".")[2] not in _NEW_OF_TASKS}
        weights = {key for key in theirs if key.startswith("env.reward_weights.")} - {"env.reward_weights.structure"}
        known = (mine.keys() & theirs.keys()) | tasks | weights
    # Keys that an earlier release counted, and that may change by now.
    known = {key for key in known if key in mine or not recipes.may_change(key)} - {_VERSION, _MODEL}
    if mine[_MODEL] is not None and mine[_MODEL] == theirs.get(_MODEL):
        known -= {"policy.model_name"}  # the same model at another place
    # An empty mapping, too, is what a release had that did not know the key.
    keys = sorted(key for key in known if mine.get(key, {}) != theirs.get(key, {}) and mine.get(key) != theirs.get(key))
    if not keys:
        return
    shown = "; ".join(f"{key}: {theirs.get(key)} there, {mine.get(key)} here" for key in keys[:SHOWN_DIFFERENCES])
    more = f" and {len(keys) - SHOWN_DIFFERENCES} more" if len(keys) > SHOWN_DIFFERENCES else ""
    raise RunDirectoryError(
        f"logger.log_dir: {directory} belongs to another recipe ({shown}{more}); set logger.log_dir to a new "
        "directory, or pass --fresh to move the earlier run aside"
    )
