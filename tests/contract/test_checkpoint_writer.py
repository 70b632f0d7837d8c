# SPDX-License-Identifier: Apache-2.0
"""Claim: megatron-core's writer of checkpoints has the parts that ``train.run.checkpoint_writing`` runs in a thread.

They are no public interface. That 0.19.2 still has the same ones, where its strategy is ``mcore``, was read in its
source; what the tests know of it is the signature of the writer, see ``tests.contract.signatures``.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import megatron.core.dist_checkpointing.strategies.torch as torch_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync


def returned(function: Callable[..., Any]) -> list[str]:
    """What a function returns, as its source says it, one text a ``return``."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    nodes = [node for node in ast.walk(definition) if isinstance(node, ast.Return) and node.value is not None]
    return [ast.unparse(node.value) for node in sorted(nodes, key=lambda node: node.lineno) if node.value]


def test_a_bucket_is_written_by_a_function_without_its_decorator() -> None:
    write = FileSystemWriterAsync.write_preloaded_data.__wrapped__  # type: ignore[attr-defined]
    names = list(inspect.signature(write).parameters)
    assert names[:6] == [
        "transform_list",
        "local_proc_idx",
        "write_bucket",
        "results_queue",
        "count_queue",
        "use_fsync",
    ]


def test_a_request_has_the_fields_that_are_read() -> None:
    assert set(AsyncRequest._fields) >= {"async_fn", "async_fn_args", "finalize_fns"}


def test_a_request_holds_transforms_buckets_and_the_results_queue_in_that_order() -> None:
    nothing, something = returned(FileSystemWriterAsync.get_save_function_and_args)
    assert nothing == "(None, None, [])"
    assert something.startswith("(partial(self.write_preloaded_data_multiproc, transform_list, self.use_msc), ")
    assert something.endswith(", [torch.distributed.get_rank(), self.write_buckets, self.results_queue])")
    [request] = returned(torch_strategy.TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks)
    assert request.startswith("AsyncRequest(save_fn, save_args, [finalize_fn]")


def test_results_are_taken_from_the_queue_of_the_module(monkeypatch: Any) -> None:
    mine = object()
    monkeypatch.setattr(filesystem_async, "_results_queue", mine)
    assert filesystem_async._get_write_results_queue() is mine
