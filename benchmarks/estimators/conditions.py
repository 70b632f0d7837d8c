# SPDX-License-Identifier: Apache-2.0
"""What is compared: advantage estimators on the quickstart's six tasks, under several conditions, at equal budgets.

Every run has the recipe of the quickstart but for what stands here: the same warm-started policy, prompts, steps,
optimizer and learning rate (chosen for g2rpo), so that arms of one seed differ in the estimator alone.
"""

from __future__ import annotations

from dataclasses import dataclass

RECIPE = "examples/recipes/vlm_g2rpo-quickstart-1n1g-megatron-tp1.yaml"
SEEDS = (1, 2, 3)
STEPS = 40
SPIKE_SHARE, SPIKE = 0.01, 50.0  # heavy tail: this share of the rewards is replaced by this value

BUDGET = (
    f"grpo.max_num_steps={STEPS}",
    "grpo.val_period=10",
    "grpo.max_val_samples=100",
    "grpo.task_gradient_period=20",
    "checkpointing.enabled=false",
    "checkpointing.export_hf=false",
    "logger.tensorboard_enabled=false",
    "logger.num_val_samples_to_print=0",
    "cluster.device=cpu",
)

ESTIMATORS = {
    "g2rpo": (),
    "g2rpo, unit variance": ("grpo.adv_estimator.variance=unit",),
    "grpo": ("grpo.adv_estimator.name=grpo",),
    "dr_grpo": ("grpo.adv_estimator.name=dr_grpo",),
    "ema_grpo": ("grpo.adv_estimator.name=ema_grpo",),
    "gdpo": ("grpo.adv_estimator.name=gdpo",),
}
UNSHAPED = "loss_fn.entropy_shaping.enabled=false"
NO_LENGTH = "env.reward_weights.length=0"
HIGH_RATE = "policy.megatron_cfg.optimizer.lr=1e-3"


@dataclass(frozen=True)
class Arm:
    """One line of a comparison.

    Attributes:
        condition: the comparison.
        name: of the arm.
        overrides: of the recipe.
        heavy_tailed: whether rewards are spiked.
    """

    condition: str
    name: str
    overrides: tuple[str, ...]
    heavy_tailed: bool = False

    def key(self, seed: int) -> str:
        """Name of a run's files."""
        words = f"{self.condition} {self.name} {seed}".replace(",", "").split()
        return "-".join(words)


ARMS = (
    *(Arm("plain", name, overrides) for name, overrides in ESTIMATORS.items()),
    *(Arm("heavy", name, overrides, heavy_tailed=True) for name, overrides in ESTIMATORS.items()),
    Arm("shaping", "off", (UNSHAPED, NO_LENGTH)),
    Arm("rate", "bounds on", (HIGH_RATE,)),
    Arm("rate", "bounds off", (HIGH_RATE, UNSHAPED)),
)
