# SPDX-License-Identifier: Apache-2.0
"""The Megatron policy: device, process groups, model, precision, log-probabilities, update step."""
