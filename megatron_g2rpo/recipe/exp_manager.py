# SPDX-License-Identifier: Apache-2.0
"""``exp_manager``: nemo-toolkit's section, by its own field names, translated to the keys of a recipe.

Every field of ``nemo.utils.exp_manager.ExpManagerConfig`` has a rule below: it becomes a key, or it may only ask for
what a run does anyway, or it is an option of something that cannot be switched on. What is not written, or null, leaves
the recipe's own value, whatever nemo-toolkit's default is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_g2rpo.recipe.errors import Fault, Origin, find_origin, shown
from megatron_g2rpo.recipe.interpolation import resolve
from megatron_g2rpo.recipe.keys import split
from megatron_g2rpo.recipe.layers import EXEMPLARS, merge
from megatron_g2rpo.recipe.source import Document

SECTION = "exp_manager"
LOG_DIR = "logger.log_dir"
# Where nemo-toolkit writes, below the working directory, unless it is told otherwise.
_EXP_DIR, _NAME = "nemo_experiments", "default"


@dataclass(frozen=True)
class Becomes:
    """A field that is a key of a recipe.

    Attributes:
        key: the dotted key.
        values: the field's value -> the key's, where they differ; any other value is refused.
        is_text: whether a number is taken as text, as nemo-toolkit does.
    """

    key: str
    values: Mapping[Any, Any] | None = None
    is_text: bool = False


@dataclass(frozen=True)
class Only:
    """A field that may ask for nothing but what a run does anyway.

    Attributes:
        values: the values that are accepted, which have no effect.
        why: what a run does instead of the others, and which key says so.
    """

    values: tuple[Any, ...]
    why: str


@dataclass(frozen=True)
class Unused:
    """A field without effect: an option of what is off, or one that a run that goes on does not look at."""


Rule = Becomes | Only | Unused | Mapping[str, "Rule"]

_NO_LOGGER = "figures go to metrics.jsonl and, with logger.tensorboard_enabled, to TensorBoard"
_NOT_YET = f"not supported yet: {_NO_LOGGER}"
_STEPS = "a run counts steps, not epochs: checkpoint_callback_params.every_n_train_steps (checkpointing.save_period)"
_NAMED = "a checkpoint is the folder step_N of checkpointing.checkpoint_dir"

CHECKPOINT_CALLBACK_PARAMS: Mapping[str, Rule] = {
    "filepath": Only((), "it is checkpoint_callback_params.dirpath (checkpointing.checkpoint_dir)"),
    "dirpath": Becomes("checkpointing.checkpoint_dir", is_text=True),
    "filename": Only((), _NAMED),
    "monitor": Becomes("checkpointing.metric_name", is_text=True),
    "verbose": Unused(),
    "save_last": Only((True,), "the newest checkpoint is always kept: a run goes on from it"),
    "save_top_k": Becomes("checkpointing.keep_top_k"),
    "save_weights_only": Only(
        (False,), "a checkpoint is all that a run needs to go on; `megatron-g2rpo convert export` writes its weights"
    ),
    "mode": Becomes("checkpointing.higher_is_better", {"max": True, "min": False}),
    "auto_insert_metric_name": Only((True,), _NAMED),
    "every_n_epochs": Only((0,), _STEPS),
    "every_n_train_steps": Becomes("checkpointing.save_period"),
    "train_time_interval": Only((), _STEPS),
    "prefix": Only((), _NAMED),
    "postfix": Only((".nemo",), "weights are exported as a Hugging Face directory (checkpointing.export_hf)"),
    "save_best_model": Only((False,), "`megatron-g2rpo convert export` exports any checkpoint that was kept"),
    "always_save_nemo": Only((False,), "`megatron-g2rpo convert export` exports any checkpoint that was kept"),
    "save_nemo_on_train_end": Becomes("checkpointing.export_hf"),
    "model_parallel_size": Only((), "it follows from policy.megatron_cfg"),
    "save_on_train_epoch_end": Only((False,), _STEPS),
    "async_save": Becomes("checkpointing.async_save"),
    "save_last_n_optim_states": Only((-1,), "every checkpoint holds the optimizer's state: a run goes on from any"),
}

FIELDS: Mapping[str, Rule] = {
    "explicit_log_dir": Becomes(LOG_DIR, is_text=True),
    "exp_dir": Becomes(LOG_DIR, is_text=True),
    "name": Becomes(LOG_DIR, is_text=True),
    "version": Becomes(LOG_DIR, is_text=True),
    # nemo-toolkit does not look at it either where a run resumes.
    "use_datetime_version": Unused(),
    "resume_if_exists": Only(
        (True,),
        "the same command always goes on; for a new run change name or version, or give --fresh, which moves the "
        "earlier run directory aside",
    ),
    # A run that is finished goes on where grpo.max_num_steps has grown, and does nothing else.
    "resume_past_end": Unused(),
    "resume_ignore_no_checkpoint": Only((True,), "a run without a checkpoint starts at its first step"),
    "resume_from_checkpoint": Only(
        (),
        "a run goes on from its newest whole checkpoint; the weights of another one are policy.pretrained_checkpoint",
    ),
    "create_tensorboard_logger": Becomes("logger.tensorboard_enabled"),
    "summary_writer_kwargs": Only(({},), "TensorBoard's events are written to logger.log_dir/tensorboard"),
    "create_wandb_logger": Only(
        (False,), "Weights & Biases is logger.wandb_enabled, with logger.wandb.project and logger.wandb.name"
    ),
    "wandb_logger_kwargs": Unused(),
    "create_mlflow_logger": Only((False,), f"MLflow is {_NOT_YET}"),
    "mlflow_logger_kwargs": Unused(),
    "create_dllogger_logger": Only((False,), f"not supported: {_NO_LOGGER}"),
    "dllogger_logger_kwargs": Unused(),
    "create_clearml_logger": Only((False,), f"not supported: {_NO_LOGGER}"),
    "clearml_logger_kwargs": Unused(),
    "create_neptune_logger": Only((False,), f"not supported: {_NO_LOGGER}"),
    "neptune_logger_kwargs": Unused(),
    "create_checkpoint_callback": Becomes("checkpointing.enabled"),
    "checkpoint_callback_params": CHECKPOINT_CALLBACK_PARAMS,
    "create_early_stopping_callback": Only((False,), "a run ends after grpo.max_num_steps (sft.max_num_steps)"),
    "create_ipl_epoch_stopper_callback": Only((False,), "a run ends after grpo.max_num_steps (sft.max_num_steps)"),
    "early_stopping_callback_params": Unused(),
    "ipl_epoch_stopper_callback_params": Unused(),
    "create_preemption_callback": Only((True,), "a run that is told to end always saves first"),
    "files_to_copy": Only(([],), "the run directory holds the recipe, resolved; copy others beside it"),
    "log_step_timing": Only((True,), "every line of metrics.jsonl has time/*"),
    "log_delta_step_timing": Only((False,), "every line of metrics.jsonl has time/*"),
    "step_timing_kwargs": {
        name: Only((value,), "every line of metrics.jsonl has the step's own time/*")
        for name, value in {"reduction": "mean", "sync_cuda": False, "buffer_size": 1}.items()
    },
    "disable_validation_on_resume": Only((True,), "a run that goes on does not repeat the validation of its start"),
    "ema": {
        "enable": Only((False,), "no moving average of the weights is kept"),
        **dict.fromkeys(("decay", "cpu_offload", "validate_original_weights", "every_n_steps"), Unused()),
    },
    "max_time_per_run": Becomes("checkpointing.checkpoint_must_save_by"),
    "seconds_to_sleep": Only((5, 5.0), "processes wait for each other, not for a time"),
    "create_straggler_detection_callback": Only((False,), "slow processes are not looked for; those that hang are"),
    "straggler_detection_params": Unused(),
    "create_fault_tolerance_callback": Only((False,), "Slurm starts a job again, and the run goes on (slurm/)"),
    "fault_tolerance": Unused(),
    "log_tflops_per_sec_per_gpu": Unused(),
}
_DIRECTORY = ("exp_dir", "name", "version")


@dataclass(frozen=True)
class Setting:
    """A key's value, and the field that it comes from.

    Attributes:
        value: a plain value.
        source: dotted name of the field, below ``exp_manager``.
        others: names of further fields that the value is made of.
    """

    value: Any
    source: str
    others: tuple[str, ...] = ()


@dataclass
class Translation:
    """What a section ``exp_manager`` says.

    Attributes:
        settings: dotted key of a recipe -> its value.
        faults: one for each field that cannot be translated.
    """

    settings: dict[str, Setting] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def refuse(self, name: str, message: str) -> None:
        """Add a fault of a field, by its dotted name below ``exp_manager``."""
        self.faults.append(Fault(f"{SECTION}.{name}", f"{SECTION}.{name}: {message}"))


def translate(section: Mapping[str, Any]) -> Translation:
    """Translate the fields of ``exp_manager``.

    Args:
        section: the fields that are written, as plain values without interpolations.
    """
    translation = Translation()
    _translate(section, FIELDS, "", translation)
    _log_dir(section, translation)
    params = section.get("checkpoint_callback_params")
    if isinstance(params, Mapping):
        _retention(params, translation)
    limit = translation.settings.get("checkpointing.checkpoint_must_save_by")
    if limit is not None and not isinstance(limit.value, str):
        # YAML reads 1:00:00:00 as a number to the base 60.
        translation.refuse(limit.source, f"must be 'DD:HH:MM:SS' in quotes, got {shown(limit.value)}")
        del translation.settings["checkpointing.checkpoint_must_save_by"]
    return translation


def _translate(section: Mapping[str, Any], rules: Mapping[str, Rule], prefix: str, result: Translation) -> None:
    for name, value in section.items():
        rule, path = rules.get(name), f"{prefix}{name}"
        if rule is None:
            near = difflib.get_close_matches(name, rules, n=1, cutoff=0.0)[0]
            result.refuse(path, f"nemo-toolkit has no such field; nearest: {SECTION}.{prefix}{near}")
        elif value is None or isinstance(rule, Unused):
            continue
        elif isinstance(rule, Only):
            if not _among(value, rule.values):
                result.refuse(path, f"{shown(value)} has no meaning here: {rule.why}")
        elif isinstance(rule, Becomes):
            _become(value, rule, path, result)
        elif isinstance(value, Mapping):
            _translate(value, rule, f"{path}.", result)
        else:
            result.refuse(path, f"must be a mapping of fields, got {shown(value)}")


def _among(value: Any, values: Sequence[Any]) -> bool:
    # True == 1, and they do not mean the same.
    return any(value == each and type(value) is type(each) for each in values)


def _become(value: Any, rule: Becomes, path: str, result: Translation) -> None:
    if rule.is_text and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if rule.is_text and not isinstance(value, str):
        result.refuse(path, f"must be text, got {shown(value)}")
        return
    if rule.values is not None:
        if not _among(value, tuple(rule.values)):
            result.refuse(path, f"must be {' or '.join(rule.values)}, got {shown(value)}")
            return
        value = rule.values[value]
    if rule.key != LOG_DIR:  # which several fields make up
        result.settings[rule.key] = Setting(value, path)


def _log_dir(section: Mapping[str, Any], result: Translation) -> None:
    """Put together the run directory, as nemo-toolkit does: ``explicit_log_dir``, or ``exp_dir/name/version``.

    An empty name is none. There is no folder for a date: a run that goes on has none in nemo-toolkit either.
    """
    parts = {name: str(section[name]) for name in _DIRECTORY if section.get(name) not in (None, "")}
    explicit = section.get("explicit_log_dir")
    if any(fault.key.removeprefix(f"{SECTION}.") in (*_DIRECTORY, "explicit_log_dir") for fault in result.faults):
        return
    if explicit and parts:
        others = ", ".join(f"{SECTION}.{name}" for name in parts)
        result.refuse("explicit_log_dir", f"is the run directory itself, beside which {others} would have no effect")
    elif explicit:
        result.settings[LOG_DIR] = Setting(str(explicit), "explicit_log_dir")
    elif parts:
        path = PurePosixPath(parts.get("exp_dir", _EXP_DIR), parts.get("name", _NAME), parts.get("version", ""))
        first, *others = parts
        result.settings[LOG_DIR] = Setting(str(path), first, tuple(others))


def _retention(params: Mapping[str, Any], result: Translation) -> None:
    """Complete what is kept: a metric has a direction, and -1 is all."""
    prefix = "checkpoint_callback_params."
    given = {name for name in ("monitor", "mode") if params.get(name) is not None}
    if given == {"monitor"}:
        result.refuse(
            f"{prefix}monitor", f"write {SECTION}.{prefix}mode beside it: max or min (nemo-toolkit takes min)"
        )
    elif given == {"mode"}:
        result.refuse(f"{prefix}mode", f"write {SECTION}.{prefix}monitor beside it, the metric that it is about")
    keep = result.settings.get("checkpointing.keep_top_k")
    if keep is None:
        return
    if _among(keep.value, (-1,)):
        result.settings["checkpointing.keep_top_k"] = replace(keep, value=None)
    elif _among(keep.value, (0,)):
        result.refuse(keep.source, "a run keeps one checkpoint at least; for none, create_checkpoint_callback: false")
        del result.settings["checkpointing.keep_top_k"]


def apply(document: Document) -> tuple[Document, list[str]]:
    """Translate the section ``exp_manager`` of a recipe, if it has one.

    Args:
        document: a recipe, merged, with its interpolations.

    Returns:
        The recipe with the keys that the section stands for, and the section still in place, to which interpolations
        may refer; and the message of every fault, with its file and line.

    Raises:
        RecipeError: an interpolation of the section leads nowhere.
    """
    written = document.tree.get(SECTION)
    if written is None:
        return document, []
    if not isinstance(written, dict):
        fault = Fault(SECTION, f"'{SECTION}' must be a mapping of fields, got {shown(written)}")
        return document, [fault.located(document.origins)]
    translation = translate(resolve(document.tree, document.origins, SECTION))
    faults = [fault.located(document.origins) for fault in translation.faults]
    faults += _conflicts(document, translation.settings)
    return merge(document, _document(translation.settings, document.origins)), faults


def _conflicts(document: Document, settings: Mapping[str, Setting]) -> Iterator[str]:
    """Return what is to be said of keys that the recipe sets beside the section.

    As everywhere in a recipe, what is inherited gives way: a key of a file that was merged before all fields of the
    setting, and an exemplar's, whose values are defaults.
    """
    for key, setting in settings.items():
        origin = document.origins.get(key)
        if origin is None or _is_default(origin):
            continue
        names = [f"{SECTION}.{name}" for name in (setting.source, *setting.others)]
        places = [find_origin(document.origins, name) for name in names]
        if all(place is not None and _turn(document, origin) < _turn(document, place) for place in places):
            continue
        off = " ".join(f"{name}=null" for name in names)
        yield (
            f"one setting by two names, remove one of them, or give {off} to leave it to {key}; set by "
            f"{names[0]} ({places[0]}), {key} ({origin})"
        )


def _turn(document: Document, origin: Origin) -> int:
    """Return when a key was merged: the last turn of its file, after which all overrides come at once."""
    if origin.line is None:
        return len(document.files)
    return max(turn for turn, file in enumerate(document.files) if file == origin.source)


def _is_default(origin: Origin) -> bool:
    return origin.line is not None and Path(origin.source).resolve().parent == EXEMPLARS.resolve()


def _document(settings: Mapping[str, Setting], origins: Mapping[str, Origin]) -> Document:
    tree: dict[str, Any] = {}
    places: dict[str, Origin] = {}
    for key, setting in settings.items():
        *around, name = split(key)
        section = tree
        for part in around:
            section = section.setdefault(part, {})
        section[name] = setting.value
        place = find_origin(origins, f"{SECTION}.{setting.source}")
        if place is not None:
            places[key] = place
    return Document(tree, places)
