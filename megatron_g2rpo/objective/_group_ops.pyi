# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

_Rewards: TypeAlias = NDArray[np.float32] | NDArray[np.float64]
_Columns: TypeAlias = dict[str, NDArray[np.int64] | NDArray[np.float64]]

def gaussian_advantages(
    rewards: _Rewards,
    groups: NDArray[np.int64],
    tasks: NDArray[np.int64],
    stages: Sequence[str],
    tie_tolerance: float,
    drop_zero_variance: bool,
    unit_variance: bool,
) -> NDArray[np.float64]: ...
def group_statistics(
    rewards: _Rewards, groups: NDArray[np.int64], tasks: NDArray[np.int64], tie_tolerance: float
) -> tuple[_Columns, _Columns]: ...
def normal_quantile(p: NDArray[np.float64]) -> NDArray[np.float64]: ...
