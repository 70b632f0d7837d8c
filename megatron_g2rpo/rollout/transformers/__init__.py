# SPDX-License-Identifier: Apache-2.0
"""The rollout engine that is embedded in every training process: a transformers model with a decoding loop of ours."""
