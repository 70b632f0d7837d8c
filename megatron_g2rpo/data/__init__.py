# SPDX-License-Identifier: Apache-2.0
"""Reading of datasets: webdataset shards become prompts; and packing: rollouts become packed micro-batches."""
