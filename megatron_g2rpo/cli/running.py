# SPDX-License-Identifier: Apache-2.0
"""What verbs do before and around their command: the recipe's model and processes, the first rank, errors."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

from megatron_g2rpo.processes import launcher
from megatron_g2rpo.recipe import Recipe

R = TypeVar("R", bound=Recipe)


def with_errors(run: Callable[[], None]) -> None:
    """Run a command. An error that the user can fix is printed without its traceback. A rank ends with its launcher."""
    launcher.watch()  # before torch is imported, which takes seconds
    from megatron_g2rpo.commands import launch

    try:
        run()
        sys.stdout.flush()  # here, where a reader that has left can be told from an error
    except launch.EXPECTED as error:
        if isinstance(error, BrokenPipeError) and not launch.is_rank() and _has_no_reader():
            _leave_quietly()
        launch.end(error)
    except BaseException as error:
        if not launch.is_rank():
            raise
        launch.end(error)


def _has_no_reader() -> bool:
    """Whether standard output is a pipe whose reader has left, as `head` does when it has seen enough."""
    watch = select.poll()
    watch.register(1, 0)
    return any(event & select.POLLERR for _, event in watch.poll(0))


def _leave_quietly() -> NoReturn:
    """End as a program that SIGPIPE ended, without Python's own complaint about what it could not print."""
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
    raise SystemExit(128 + signal.SIGPIPE)


def prepare_processes(recipe: Recipe) -> bool:
    """Set the recipe's environment variables, and return whether processes must be launched, which then inherit them.

    Call it before the policy is imported: Transformer Engine reads some of the variables as it is loaded.
    """
    from megatron_g2rpo.policy.environment import set_environment

    set_environment(recipe.policy.megatron_cfg.env_vars)
    nodes, processes = recipe.cluster.num_nodes, recipe.cluster.gpus_per_node
    if "RANK" in os.environ:
        return False
    if nodes > 1:
        raise ValueError(
            f"the recipe asks for {nodes} nodes of {processes} processes: start it with `sbatch slurm/train_g2rpo.sh`, "
            "or on this machine alone with --nproc N"
        )
    return processes > 1


def cluster_overrides(nproc: int | None) -> list[str]:
    """Return overrides of the cluster's size: from torchrun's environment if there is one, else from ``--nproc``."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        return [f"cluster.gpus_per_node={local}", f"cluster.num_nodes={world // local}"]
    return [] if nproc is None else [f"cluster.gpus_per_node={nproc}", "cluster.num_nodes=1"]


def is_first() -> bool:
    """Return whether this process is rank 0 of its job, or no rank: the one that prints."""
    return int(os.environ.get("RANK", "0")) == 0


def with_local_model(recipe: R) -> R:
    """Return the recipe with ``policy.model_name`` as a local directory whose model fits the recipe's layout.

    Raises:
        ValueError: the model cannot be split as the layout asks.
    """
    from megatron_g2rpo.commands.model_dir import with_local_model
    from megatron_g2rpo.policy.layouts.layout import check_model_dir

    local = with_local_model(recipe)
    check_model_dir(local.policy.model_name, local.policy.megatron_cfg)
    return local


def policy_recipe(overrides: list[str], nproc: int | None) -> Recipe:
    """Return a recipe for a command that reads only the sections ``policy`` and ``cluster``."""
    from megatron_g2rpo import recipe as recipes

    # A recipe must have at least one task; these commands use none.
    settings = ["env.tasks={any: {}}", *overrides, *cluster_overrides(nproc)]
    return with_local_model(recipes.load(recipes.EXEMPLARS / "vlm_sft.yaml", settings, "sft"))
