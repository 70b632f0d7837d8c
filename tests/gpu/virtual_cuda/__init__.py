# SPDX-License-Identifier: Apache-2.0
"""A CUDA device made of host memory, for a CPU-only build of torch 2.13.

``python -m tests.gpu.virtual_cuda COMMAND...`` runs a command whose Python processes all have eight of them: ``build``
compiles the C++ files (device.h says what is where), ``install`` completes ``torch.cuda``.

What is as on a GPU: tensors that say ``cuda:N`` and refuse an operand elsewhere, by the rules of torch's own
declarations; generators, memory counts, streams, events and sync debug mode per device; NCCL that takes dense,
contiguous CUDA tensors. What is not: kernels (the CPU's compute), the numbers that a generator draws, speed, a limit of
memory, and any order among streams, for all work is done at once.
"""

from tests.gpu.virtual_cuda.synchronisations import counted_synchronisations, synchronisations

__all__ = ["counted_synchronisations", "synchronisations"]
