# SPDX-License-Identifier: Apache-2.0
"""Sixty training samples of the paper's data, as its authors published them (Apache-2.0): ``ROWS`` is their file.

Source: ``example_data/sample_train_data.json`` of the public repository of OpenVLThinkerV2; the images are not part of
it.
"""

from pathlib import Path

ROWS = Path(__file__).parent / "sample_train.json"
