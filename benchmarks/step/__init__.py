# SPDX-License-Identifier: Apache-2.0
"""The whole step beside TRL's ``GRPOTrainer`` and a plain-torch floor: ``python -m benchmarks.step.run``.

``sizes`` says what is measured, ``workload`` makes the model and the prompts, one file a side (``ours``, ``trl``,
``floor``) takes steps, ``side`` is the process that one of them runs in, ``run`` lets the processes take turns, and
``report`` writes the tables. ``profile`` says by operator where our update's time goes.
"""
