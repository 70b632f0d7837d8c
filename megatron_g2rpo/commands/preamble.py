# SPDX-License-Identifier: Apache-2.0
"""The first lines of a run: what runs where, as ``doctor`` and ``plan`` would say it, and what it learns with."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.commands.doctor import kernels
from megatron_g2rpo.models.cards import CARDS, card_of
from megatron_g2rpo.plan.model import Model, read_config
from megatron_g2rpo.plan.planner import make_plan
from megatron_g2rpo.plan.speed import estimate
from megatron_g2rpo.policy.device import Device, hardware, select
from megatron_g2rpo.policy.machine import this_machine
from megatron_g2rpo.recipe import Recipe, TrainRecipe

# What of ``doctor``'s report on a recipe is said at every start.
_SAID = ("layers", "attention", "optimizer", "fp8")
_ENGINES = {
    "transformers": "in the training processes",
    "vllm": "in the training processes",
    "vllm_server": "over HTTP",
}


def preamble(recipe: Recipe) -> Iterator[str]:
    """Iterate over the lines; the first rank of a job prints them.

    Args:
        recipe: the run's recipe, its model a local directory.

    Raises:
        DeviceError: the recipe's device is not there.
    """
    device = select(recipe.cluster.device)
    yield f"run: {recipe.logger.log_dir}"
    facts = dict(line.split(": ", 1) for line in recipes.describe_layout(recipe).splitlines() if ": " in line)
    yield f"processes: {facts['processes']}, {facts['layout']}"
    yield _device(recipe, device)
    if isinstance(recipe, TrainRecipe):
        yield _engine(recipe)
        yield _objective(recipe)
    yield f"step: {facts['step']}"
    yield from _cost(recipe, device)


def _device(recipe: Recipe, device: Device) -> str:
    """What ``doctor`` says of the recipe on this machine, on one line."""
    wanted = kernels.wanted(recipe, device, this_machine(device))
    said = [f"{what} refused: {message}" for what, message in wanted.refusals]
    if wanted.kernels is not None:
        chosen = {what: choice for what, choice, _ in wanted.kernels.describe()}
        said += [f"{what} {chosen[what]}" for what in _SAID if chosen[what] != "none"]
    name = hardware(device).name or "cpu"
    return f"device: {name}, {recipe.policy.precision}, {device.backend}; {', '.join(said)}"


def _engine(recipe: TrainRecipe) -> str:
    generation = recipe.policy.generation
    servers = ""
    if generation.backend == "vllm_server":
        servers = f" from {', '.join(generation.vllm_server_cfg.addresses)}"
    where = _ENGINES.get(generation.backend, "of imports:")
    return f"engine: {generation.backend}, {where}{servers}, at most {generation.max_new_tokens} tokens a response"


def _objective(recipe: TrainRecipe) -> str:
    divergence = recipe.loss_fn.reference_policy_kl
    line = f"objective: advantages {recipe.grpo.adv_estimator.name}, surrogate {recipe.loss_fn.name}"
    if divergence.penalty == 0.0:
        return f"{line}, no KL penalty"
    return f"{line}, KL penalty {divergence.penalty:g} ({divergence.kind}, in the {divergence.where})"


def _cost(recipe: Recipe, device: Device) -> Iterator[str]:
    """What ``plan`` says of a step with the longest sequences that the recipe allows."""
    try:
        plan = make_plan(recipe, Model(read_config(recipe.policy.model_name)))
        speed = estimate(plan, CARDS["h100"])  # the operations are the same on any card
    except ValueError as error:
        yield f"plan: none, {error}"
        return
    line = (
        f"plan: at most {speed.tokens:,.0f} tokens a step and {speed.model_flops:.3g} operations of its update, "
        f"{plan.worst.peak / 1e9:.3g} GB on the process with the most"
    )
    product = hardware(device).name
    card = card_of(product)
    if card is not None:
        line += f", {estimate(plan, card).step:,.1f} s by the data sheet of {product}"
    yield line
