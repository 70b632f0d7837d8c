# SPDX-License-Identifier: Apache-2.0
"""Advantage estimators, by the name a recipe gives them; one family a file.

An estimator maps the rows of the whole global batch, and what it remembers of earlier steps, to float64 advantages
``[N]``. It must not depend on the order of the rows, bit for bit: ``sharded_advantages`` relies on it. A new one is a
function with the decorator ``register`` in a file that is imported here; its keyword-only parameters are its options.
"""

from megatron_g2rpo.objective.estimators import (  # noqa: F401  (they register themselves)
    batch_relative,
    decoupled,
    gaussian,
    group_relative,
    moving_average,
)
from megatron_g2rpo.objective.estimators.base import Estimator, bind, get, names, options, register, uses_parts

__all__ = ["Estimator", "bind", "get", "names", "options", "register", "uses_parts"]
