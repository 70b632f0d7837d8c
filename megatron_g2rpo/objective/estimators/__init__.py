# SPDX-License-Identifier: Apache-2.0
"""Advantage estimators, found by the name that a recipe uses; each file holds one family of them.

An estimator maps the rollouts of the whole global batch, and what it remembers of earlier steps, to float64 advantages
``[N]``. It must not depend on the order of the rollouts, bit for bit: ``sharded_advantages`` relies on it. A new one is
a function with the decorator ``register``, in a file that is imported here or that a recipe's ``imports`` names; its
keyword-only parameters are its options. Beside its name the decorator takes these facts: ``uses_parts`` (it reads the
parts of the rewards, which are then gathered), ``min_group_size`` (a number, or a function of its options: in smaller
groups every advantage would be 0) and ``check`` (a function of its options that raises ``ValueError`` when a recipe is
loaded).
"""

from megatron_g2rpo.objective.estimators import (  # noqa: F401  (they register themselves)
    batch_relative,
    decoupled,
    gaussian,
    group_relative,
    moving_average,
)
from megatron_g2rpo.objective.estimators.base import (
    Estimator,
    bind,
    get,
    names,
    options,
    register,
    uses_parts,
)

__all__ = ["Estimator", "bind", "get", "names", "options", "register", "uses_parts"]
