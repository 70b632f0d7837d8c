# SPDX-License-Identifier: Apache-2.0
"""``megatron-g2rpo convert import``: weights from a Hugging Face directory to a Megatron checkpoint, at any layout.

A rank holds its shards and one full tensor more. The checkpoint appears whole or not at all. No layer computes anything
here, so that none needs the kernels that training does.
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_g2rpo.collectives import from_first
from megatron_g2rpo.commands.convert.common import check_target, progress_bar, remove_on_failure
from megatron_g2rpo.policy.device import init_process_group, select, set_cpu_threads
from megatron_g2rpo.policy.machine import Machine, this_machine
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.recipe import Policy, Recipe
from megatron_g2rpo.train.run.checkpoints import write_checkpoint
from megatron_g2rpo.weights import SafetensorsDirectory


def import_hf(recipe: Recipe, target: Path) -> None:
    """Write ``policy.model_name`` as a Megatron checkpoint, which any layout can load. A collective of all ranks.

    Args:
        recipe: the recipe, of which ``policy`` and ``cluster`` are read.
        target: a directory that does not exist.

    Raises:
        FileExistsError: the target exists.
        CheckpointError: the weights do not fit the model's config (all that does not is listed), or are not finite.
        KernelError: the recipe asks by name for kernels that the machine lacks.
    """
    device = select(recipe.cluster.device)
    if device.kind == "cpu":
        set_cpu_threads(recipe.cluster.gpus_per_node)
    share = SafetensorsDirectory(recipe.policy.model_name).nbytes // recipe.policy.megatron_cfg.model_parallel_size
    init_process_group(device)
    from_first(lambda: check_target(target))  # torchrun may have started this, without a launcher that looked
    with progress_bar("reading", share, show=dist.get_rank() == 0) as advance:
        settings = with_layers_at_hand(recipe.policy, this_machine(device))
        policy = MegatronPolicy(settings, device, seed=0, max_steps=None, on_loaded=advance)
    with remove_on_failure(target):
        write_checkpoint(target, policy, policy.sharded_state_dict())


def with_layers_at_hand(settings: Policy, machine: Machine) -> Policy:
    """Return the settings with local layers where ``auto`` would want Transformer Engine and it is not installed.

    Training refuses that, because local layers are far slower there; the weights and their names in a checkpoint are
    the same.

    Args:
        settings: the recipe's ``policy`` section.
        machine: the facts of this machine.
    """
    if machine.packages["transformer_engine"]:
        return settings
    megatron = settings.megatron_cfg
    automatic = [key for key in ("transformer_impl", "core_attention") if getattr(megatron, key) == "auto"]
    local = megatron.model_copy(update=dict.fromkeys(automatic, "local"))
    return settings.model_copy(update={"megatron_cfg": local})
