# SPDX-License-Identifier: Apache-2.0
"""What the G2RPO loop and supervised training share: start, validation, checkpoints, the end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_g2rpo import progress, weights
from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.collectives import from_first, is_on_all_ranks
from megatron_g2rpo.recipe import Recipe, TrainRecipe
from megatron_g2rpo.rollout.base import EngineUnavailable
from megatron_g2rpo.train.assembly import Components
from megatron_g2rpo.train.run import metrics_file
from megatron_g2rpo.train.run.checkpoints import Checkpoints, Found
from megatron_g2rpo.train.run.examples import in_turn
from megatron_g2rpo.train.run.logs import Column, MetricsLog, StepMetrics
from megatron_g2rpo.train.run.metrics_file import METRICS_FILE
from megatron_g2rpo.train.run.owners import run_id
from megatron_g2rpo.train.run.profiling import StepProfiler
from megatron_g2rpo.train.run.report_page import ReportPage
from megatron_g2rpo.train.run.retention import Retention
from megatron_g2rpo.train.run.saved_record import record_saved
from megatron_g2rpo.train.run.signals import STARTED
from megatron_g2rpo.train.run.stopping import RunStopped, SamplingStopped, remedy
from megatron_g2rpo.train.run.summary import begins_at, summary
from megatron_g2rpo.train.run.trackers.feed import Trackers
from megatron_g2rpo.train.run.validation import validate

_UNLOGGED = "unlogged"  # in a checkpoint: metrics of its step, which was not validated when the run was asked to stop


class Run:
    """The state around a loop: which step comes next, when to validate and save.

    A loop does, in ``naming_checkpoints``, ``begin``, then for each step: train, ``validation``, log, ``save``,
    ``stop_if_asked``. A step is saved after it was logged, so that none is missing in the log of a resumed run. A step
    whose validation was broken off by a stop is saved with its metrics; it is validated and logged when the run
    goes on.

    Args:
        recipe: the run's recipe.
        components: what the loop works with; restored from the newest checkpoint if there is one.

    Attributes:
        first_step: the step that the run continues after; 0 for a new run.
        logged_step: the last step whose metrics are in the log for good; -1 for a new run.
    """

    def __init__(self, recipe: Recipe, components: Components) -> None:
        self._recipe, self._components = recipe, components
        self._log: MetricsLog | None = None
        self._notes: list[str] = []  # until there is a log
        self._loop = recipe.grpo if isinstance(recipe, TrainRecipe) else recipe.sft
        options = recipe.checkpointing
        self._run_id = from_first(lambda: run_id(recipe.logger.log_dir))
        self._export = Path(recipe.logger.log_dir) / "hf"
        if options.export_hf:  # now, not after days of training
            from_first(lambda: weights.Owner(self._run_id).check(self._export))
        self._checkpoints = Checkpoints(
            options.checkpoint_dir,
            Retention(options.keep_top_k, options.metric_name, options.higher_is_better),
            components.processor.settings,
            run_id=self._run_id,
            recipe=recipes.dump(recipe),
            is_async=options.async_save,
            note=self._note,
            saved=self._saved_step,
        )
        self._profiler = StepProfiler(recipe.logger, components.device, self._note)
        self._stopping = components.stopping
        self.first_step, self.logged_step = 0, -1
        self._unlogged: Mapping[str, float] = {}  # metrics of the first step, which was not validated
        self._got_on = False  # whether this process did what was left of the first step
        self._metrics: Mapping[str, float] = {}  # of the last validation
        self._validated = False
        self._page = ReportPage(
            Path(recipe.logger.log_dir), enabled=recipe.logger.report_enabled and dist.get_rank() == 0, note=self._note
        )
        self._page_due = False  # whether the step that is being taken was validated
        grpo = recipe.grpo if isinstance(recipe, TrainRecipe) else None
        size = recipe.policy.train_global_batch_size if grpo is None else grpo.num_prompts_per_step
        self._notes += components.stream.shortages(size)
        found = self._checkpoints.newest_whole() if recipe.checkpointing.enabled else Found(None)
        self._notes += found.notes
        if found.step is not None:
            state = self._checkpoints.load(found.step, components.policy)
            self._notes += components.stream.load_state_dict(state["stream"])
            components.history.load_state_dict(state["history"])
            if "guard" in state:  # releases up to 0.4 wrote none
                components.guard.load_state_dict(state["guard"])
            self._unlogged = state.get(_UNLOGGED, {})
            self.first_step = state["step"]
            self.logged_step = self.first_step - 1 if self._unlogged else self.first_step
            self._notes += from_first(self._unrecorded)
            self._metrics = found.metrics or {}
            # A deadline leaves time for a checkpoint from the first step on.
            self._stopping.saved_in(found.seconds or 0.0)
        self._stopping.begin()

    def log(self, columns: Sequence[Column], *, quiet: bool = False) -> MetricsLog:
        """Return the run's log, which goes on after the steps that are in it for good.

        Args:
            columns: columns of the console table.
            quiet: whether the console shows warnings alone.
        """
        section = self._recipe.logger
        return MetricsLog(
            section,
            columns,
            self.last_step,
            self.logged_step,
            enabled=dist.get_rank() == 0,
            trackers=Trackers(section, self._recipe.model_dump(mode="json"), self._run_id),
            quiet=quiet,
        )

    def _note(self, line: str) -> None:
        """Show the user a line, now or when there is a log."""
        if self._log is None:
            self._notes.append(line)
        else:
            self._log.note(line)

    def _saved_step(self, step: int) -> None:
        if self._run_id:  # else nobody has claimed the directory, and nobody will ask
            record_saved(Path(self._recipe.logger.log_dir), step)

    def _unrecorded(self) -> list[str]:
        """A line for the user if steps that the run goes on from are not in its log."""
        path = Path(self._recipe.logger.log_dir) / METRICS_FILE
        missing = metrics_file.missing_steps(path, self.logged_step)
        if not missing:
            return []
        more = f" and {len(missing) - 1} more of the steps before" if len(missing) > 1 else ""
        return [
            f"warning: {path} has no line of step {missing[-1]}{more}, which the checkpoint of step {self.first_step} "
            "is beyond: the file was cut or removed; restore it from a copy, the run does not take these steps again"
        ]

    @property
    def last_step(self) -> int:
        """The step that the run ends after."""
        return self._loop.max_num_steps

    @property
    def steps(self) -> Iterator[int]:
        """Steps that are still to do, counted from 1; each is said to begin (``progress``) as it is asked for."""
        for step in range(self.first_step + 1, self.last_step + 1):
            progress.enter("step", step=step)
            yield step

    def begin(self, log: MetricsLog) -> None:
        """Do what comes before the next step: say what must be known of the data, and validate. A collective.

        A new run validates the policy and logs it as step 0, if the recipe asks for it; a resumed one does what its
        last step still lacks.

        Raises:
            RunStopped: a signal or a deadline asked for it.
        """
        self._log = log
        for note in (*begins_at(self._recipe, self.first_step), *self._notes):
            log.note(note)
        if self.first_step == 0 and self._loop.val_at_start:
            try:
                log.log(StepMetrics(step=0, values=self._validate(0, log)))
            except SamplingStopped as stopped:
                raise self._stopped(0, self._state(), str(stopped)) from None
            except EngineUnavailable:
                reason = self._stopping.agreed()
                if reason is None:
                    raise
                raise self._stopped(0, self._state(), reason) from None
        elif self._unlogged:
            found = self.validation(self.first_step, log, self._unlogged)
            log.log(StepMetrics(step=self.first_step, values={**self._unlogged, **found}))
            self._got_on = True
            self._write(self.first_step, self._state())  # with what ranks it, in place of the one without
        self.stop_if_asked(self.first_step)

    def profiled(self, step: int) -> AbstractContextManager[None]:
        """Return a context whose body is recorded if the recipe asks for a trace of the step (``logger.profile``)."""
        return self._profiler.step(step)

    def validation(self, step: int, log: MetricsLog, metrics: Mapping[str, float]) -> dict[str, float]:
        """Validate the policy after a step, when it is time to. A collective of all ranks.

        Args:
            step: number of the step, from 1.
            log: the log that shows examples and warnings.
            metrics: the metrics of the step, which are logged here if the engine is lost.

        Returns:
            ``val/...`` and ``time/validation``; empty when it is not time to validate.

        Raises:
            EngineUnavailable: the engine was lost; the step is logged and saved all the same.
            RunStopped: so it was, and the run was asked to stop; or it was while it validated, and the step is saved.
        """
        period = self._loop.val_period
        due = self._loop.val_at_end if step == self.last_step else period > 0 and step % period == 0
        if not due:
            return {}
        try:
            found = self._validate(step, log)
            self._page_due = True
            return found
        except SamplingStopped as stopped:
            raise self._stopped(step, self._state_without_validation(metrics), str(stopped)) from None
        except EngineUnavailable as error:
            reason = self._stopping.agreed()
            if reason is not None:
                raise self._stopped(step, self._state_without_validation(metrics), reason) from None
            log.log(StepMetrics(step=step, values=metrics))
            raise self._saved(step, self._state(), error) from error

    def save(self, step: int) -> None:
        """Save a step that was taken, when it is time to: every ``save_period`` steps and at the end. A collective.

        With ``checkpointing.async_save`` it is written while the next steps run. It gets its name at the end of the
        first step by which every rank has written it, and an error of the disk is raised there.

        Raises:
            CheckpointWriteError: a checkpoint could not be written; names it, the rank and the cause.
            PolicyNotFinite: the policy holds NaN or an infinity, and is not saved.
        """
        options = self._recipe.checkpointing
        if options.enabled:
            self._checkpoints.poll()
            if step == self.last_step or step % options.save_period == 0:
                self._write(step, self._state())
            self._stopping.saved_in(self._checkpoints.longest_s)  # in the background, too
        if self._page_due or step == self.last_step:
            self._page.begin()
            self._page_due = False
        self._stopping.step_ended()

    @contextmanager
    def naming_checkpoints(self, log: MetricsLog) -> Iterator[None]:
        """Give the checkpoint that is being written its name also where an error of all ranks ends the run.

        After an error of this rank alone it is not waited for: the others are in a collective that this rank does not
        join, and the next start goes on from the checkpoint before.

        Args:
            log: the log that shows a warning if the checkpoint could not be written.
        """
        try:
            yield
        except Exception as error:
            if is_on_all_ranks(error):
                progress.enter("checkpoint")
                try:
                    self._checkpoints.finish()
                except Exception as lost:  # noqa: BLE001 (the user must read what ended the run)
                    log.note(f"warning: {lost}")
            raise

    def stop_if_asked(self, step: int) -> None:
        """End the run after ``step`` if a signal or a deadline asks for it. A collective of all ranks.

        Args:
            step: number of the step that was taken, logged and, if it was time to, saved; 0 before the first.

        Raises:
            RunStopped: it was asked for; the step is saved, and the message says where.
        """
        reason = self._stopping.agreed(steps=0 if step == self.last_step else 1)
        if reason is not None:
            raise self._stopped(step, self._state(), reason)

    @contextmanager
    def sampling(self, step: int) -> Iterator[None]:
        """Guard a step: one that could not sample leaves a checkpoint of what was before it.

        Args:
            step: number of the step, from 1.

        Raises:
            EngineUnavailable: the step lost its engine; the message says where the checkpoint is.
            RunStopped: the run was asked to stop while the step sampled, and dropped its rollouts or lost its engine.
        """
        before = self._state()
        try:
            yield
        except EngineUnavailable as error:
            raise self._saved(step - 1, before, error) from error
        except SamplingStopped as stopped:
            raise self._stopped(step - 1, before, str(stopped)) from None

    def _state(self) -> dict[str, Any]:
        """Plain values that a checkpoint keeps beside the policy."""
        components = self._components
        return {
            "stream": components.stream.state_dict(),
            "history": components.history.state_dict(),
            "guard": components.guard.state_dict(),
        }

    def _state_without_validation(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """The state after a step that is to be validated and logged when the run goes on. A collective."""
        # Seconds are each rank's own, and a checkpoint's plain values must be equal on all.
        return {**self._state(), _UNLOGGED: from_first(lambda: dict(metrics))}

    def _saved(self, step: int, state: dict[str, Any], error: EngineUnavailable) -> EngineUnavailable | RunStopped:
        """Save the policy as it is as that of ``step``, unless it is saved already, and add to the error where.

        Where the run was asked to stop, its servers were too, and may be gone first: that is no error. A collective.
        """
        reason = self._stopping.agreed()
        if reason is not None:
            return self._stopped(step, state, reason)
        options = self._recipe.checkpointing
        if not options.enabled:
            return EngineUnavailable(f"{error}\ncheckpointing.enabled is false: the steps since the start are lost")
        self._write_unless_there(step, state)
        return EngineUnavailable(
            f"{error}\n{step} steps are saved in {options.checkpoint_dir}/step_{step}; the same command goes on there"
        )

    def _stopped(self, step: int, state: dict[str, Any], reason: str) -> RunStopped:
        """Save the policy as that of ``step``, unless it is saved already; what to raise then. A collective.

        A deadline that leaves no time for a step ends the run for good: the same command would end so each time, and
        a job that is queued again for ever costs more than one that fails.
        """
        options, todo = self._recipe.checkpointing, remedy(reason)
        got_on = self._got_on or step > self.first_step
        if todo is not None and not got_on:
            where = f"{time.monotonic() - STARTED:.0f} s after the start, with no step taken since: {todo}"
            resumable = False
        elif step == 0:
            where, resumable = "before the first step; the same command starts the run", True
        elif options.enabled:
            self._write_unless_there(step, state)
            where = f"after step {step}, saved in {options.checkpoint_dir}/step_{step}; the same command goes on there"
            resumable = True
        else:
            where = f"after step {step}; checkpointing.enabled is false: the steps since the start are lost"
            resumable = False
        self._stopping.saved()
        return RunStopped(f"stopped by {reason} {where}", resumable=resumable)

    def _write_unless_there(self, step: int, state: dict[str, Any]) -> None:
        """Have a step's checkpoint on the disk when this returns."""
        self._checkpoints.finish()
        if not self._checkpoints.has(step):
            self._write(step, state)
            self._checkpoints.finish()

    def _write(self, step: int, state: dict[str, Any]) -> None:
        progress.enter("checkpoint")
        start = time.monotonic()
        self._checkpoints.save(step, self._components.policy, state, self._metrics)
        self._stopping.saved_in(time.monotonic() - start)

    def finish(self) -> Path | None:
        """Wait for the last checkpoint, and export the policy as a Hugging Face directory, if the recipe asks for it.

        A collective of all ranks.

        Returns:
            The directory, or None.

        Raises:
            CheckpointWriteError: see ``save``.
        """
        self._checkpoints.finish()
        self._stopping.end()
        exported = self._exported() if self._recipe.checkpointing.export_hf else None
        if self._log is not None:
            self._log.complete()  # before the page, which may take minutes
        self._page.finish()
        if self._log is not None and self._log.enabled:
            for line in summary(self._recipe, self.first_step, time.monotonic() - STARTED):
                self._log.note(line)
        return exported

    def _exported(self) -> Path:
        progress.enter("export")
        weights.export_hf(
            self._components.policy.stream(),
            self._components.policy.specs(),
            self._export,
            source=self._recipe.policy.model_name,
            write=dist.get_rank() == 0,
            settings=self._components.processor.settings,
            run_id=self._run_id,
        )
        dist.barrier()
        return self._export

    def _validate(self, step: int, log: MetricsLog) -> dict[str, float]:
        progress.enter("validation")
        start = time.perf_counter()
        self._components.engine.load_weights(self._components.policy.source())
        result = validate(self._recipe, self._components)
        self._components.engine.release()
        period = self._loop.val_period
        turn = -(-step // period) if period else int(step > 0)
        number = self._recipe.logger.num_val_samples_to_print
        log.examples(step, result.examples, in_turn(result.examples, number, turn))
        shown = ("val/mean_reward", "val/mean_greedy_reward", "val/mean_greedy_accuracy")
        means = [f"{name[4:]} {result.metrics[name]:.4f}" for name in shown if name in result.metrics]
        log.note("validation  " + "  ".join(means))
        for warning in () if self._validated else result.warnings:
            log.note(warning)
        for line in result.failures:
            log.note(line)
        self._validated = True
        ranking = self._recipe.checkpointing.metric_name
        # There is data for it (``assemble``): what it is the mean of had no reward this time.
        if ranking is not None and ranking not in result.metrics:
            log.note(
                f"warning: this validation has no {ranking}, as every reward that it is made of failed; checkpoints up "
                "to the next validation rank behind those that have it"
            )
        self._metrics = result.metrics
        return {**result.metrics, "time/validation": time.perf_counter() - start}
