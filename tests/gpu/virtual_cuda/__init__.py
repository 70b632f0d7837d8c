# SPDX-License-Identifier: Apache-2.0
"""A CUDA device made of host memory, for a CPU-only build of torch 2.13.

``device.cpp`` is the device, ``install`` makes a process believe in it, and ``python -m tests.gpu.virtual_cuda``
runs a command whose Python processes all do.
"""
