# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
# (vLLM has an environment of its own; tests/vllm/contract holds what is used of it.)
"""Transfer of weights to vLLM servers, by vLLM's own weight-transfer classes: its NCCL engine, or files.

vLLM loads ``register`` in each of its processes (entry point ``vllm.general_plugins``), which makes ``files`` known to
its workers beside ``nccl``. The trainer's half of either is driven by ``send_weights``, a collective of the trainer.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from vllm.distributed.weight_transfer import base as transfer
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from megatron_g2rpo import weights
from megatron_g2rpo.rollout.vllm import reload

# Of ``weight_transfer`` in the recipe, and what vLLM calls it.
FILES, BROADCAST = "files", NCCLTrainerInitInfo.backend
# Of one file.
BUCKET = "5GB"


def backend_of(weight_transfer: str, *, between_gpus: bool) -> str:
    """Return vLLM's name of the transfer that a recipe asks for.

    Args:
        weight_transfer: ``policy.generation.vllm_server_cfg.weight_transfer``.
        between_gpus: whether trainer and servers are on GPUs, which decides what ``auto`` means.
    """
    if weight_transfer == "auto":
        return BROADCAST if between_gpus else FILES
    return BROADCAST if weight_transfer == "broadcast" else FILES


def register() -> None:
    """Make ``files`` a backend of vLLM's ``--weight-transfer-config``."""
    if FILES not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(FILES, __name__, "FilesEngine")


@dataclass
class FilesInitInfo(transfer.WeightTransferInitInfo):
    """Information for the start of a transfer by files, which needs none."""


@dataclass
class FilesUpdateInfo(transfer.WeightTransferUpdateInfo):
    """Information for one update by files.

    Attributes:
        directory: directory of safetensors files, by the path that the server sees.
    """

    directory: str


class FilesEngine(transfer.WeightTransferEngine[FilesInitInfo, FilesUpdateInfo]):
    """The worker's half of a transfer by files: it reads its share of every tensor from a directory."""

    init_info_cls = FilesInitInfo
    update_info_cls = FilesUpdateInfo

    def init_transfer_engine(self, init_info: FilesInitInfo) -> None: ...

    def start_weight_update(self) -> None: ...

    def finish_weight_update(self) -> None: ...

    def shutdown(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronizes an accelerator, which there may not be; copies from files have ended here.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: FilesUpdateInfo) -> None:
        """Load the weights of the update's directory into the worker's model.

        Raises:
            ValueError: parameters of the model are not in the directory.
        """
        tensors = weights.SafetensorsDirectory(update_info.directory)
        missing = reload.reload(self.model, weights=tensors.items(), model_config=self.model_config)
        if missing:
            raise ValueError(reload.incomplete(missing))


class Source(transfer.WeightSource):
    """The policy's weights, in the interface that vLLM's transfer engines read; all of its reads are collectives."""

    def begin(self, current: weights.WeightSource) -> None:
        """Set the weights of the transfer that begins."""
        self._current = current
        self._specified = self._streamed = False

    def specs(self) -> dict[str, Tensor]:
        """Return the tensors to come, on the meta device, by name."""
        self._specified = True
        return self._current.specs()

    def metadata(self) -> list[transfer.ParamMeta]:
        return [transfer.ParamMeta(name, spec.dtype, tuple(spec.shape)) for name, spec in self.specs().items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._streamed = True
        return iter(self._current)

    def drain(self) -> None:
        """Join the collectives that this rank has not joined yet, so that other ranks do not wait for it."""
        if not self._specified:
            self.specs()
        if not self._streamed:
            for _ in self:
                pass


@dataclass
class FilesTrainerInitInfo(transfer.TrainerInitInfo):
    """Settings of the trainer's half of a transfer by files.

    Attributes:
        directory: directory to write to.
    """

    backend: ClassVar[str] = FILES

    directory: Path


class FilesTrainer(transfer.TrainerWeightTransferEngine[FilesTrainerInitInfo]):
    """The trainer's half of a transfer by files.

    Rank 0 writes a directory of safetensors files, tensor by tensor, and then tells the servers to read it.

    Attributes:
        name: name of the next directory.
    """

    init_info_cls = FilesTrainerInitInfo
    name: str

    def __init__(self, directory: Path, **keywords: Any) -> None:
        super().__init__(**keywords)
        self._directory = directory

    @classmethod
    def trainer_init(
        cls,
        init_info: FilesTrainerInitInfo,
        *,
        client: transfer.VLLMWeightSyncClient,
        source: transfer.WeightSource | None = None,
    ) -> FilesTrainer:
        return cls(init_info.directory, client=client, source=source, is_sender=init_info.is_sender)

    def send_weights(self) -> None:
        """Write the directory, have the servers read it, and remove it. A collective of all trainer ranks."""
        assert isinstance(self.source, Source)
        specs = self.source.specs()
        if not self.is_sender:
            for _ in self.source:
                pass
            return
        directory = self._directory.absolute() / self.name
        directory.mkdir(parents=True)
        try:
            with weights.ShardedWriter(directory, specs, max_shard_size=BUCKET) as writer:
                for name, tensor in self.source:
                    writer.write(name, tensor)
            self.client.start_weight_update()
            self.client.update_weights({"directory": str(directory)})
            self.client.finish_weight_update()
        finally:
            shutil.rmtree(directory, ignore_errors=True)
