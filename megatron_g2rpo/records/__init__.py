# SPDX-License-Identifier: Apache-2.0
"""Rollouts on disk: a Parquet file a step, a row a rollout, read by pandas, duckdb and the verbs of this package."""
