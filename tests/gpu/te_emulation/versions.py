# SPDX-License-Identifier: Apache-2.0
"""What the extension says of the machine. The versions are those of the CUDA 13.0 wheels of Transformer Engine 2.20."""

from __future__ import annotations


def get_cublasLt_version() -> int:
    """Return the version of cuBLASLt, 13.1.0."""
    return 130100


def get_cudnn_version() -> int:
    """Return the version of cuDNN, 9.19.0. From 9.6 on the statistics of packed attention are packed themselves."""
    return 91900


def get_num_cublas_streams() -> int:
    """Return how many streams run the GEMMs of experts."""
    return 4


def device_supports_multicast(device_id: int = -1) -> bool:
    """Whether the device can write to many at once (NVLink SHARP)."""
    return False


def get_stream_priority_range(device_id: int = -1) -> tuple[int, int]:
    """Return the lowest and the highest priority of a stream."""
    return 0, -5


def ubuf_built_with_mpi() -> bool:
    """Whether userbuffers start over MPI."""
    return False


def nvte_built_with_cublasmp() -> bool:
    """Whether GEMMs can overlap communication by cuBLASMp."""
    return False
