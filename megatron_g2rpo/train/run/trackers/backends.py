# SPDX-License-Identifier: Apache-2.0
"""What is said to each tracker's library: a run with its configuration, numbers of a step, a table of samples.

Both libraries are imported here alone, in the tracker's process. Versions that this was tried with are in
``constraints/trackers.txt``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

SAMPLES = "val/samples"
# Characters of a cell of a table; trackio's page and W&B's show less.
CELL_LIMIT = 4000


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Which run of the tracker this is.

    Attributes:
        project: the tracker's project.
        name: what the run is called there; None: after the run directory.
        entity: user or team of the project, of Weights & Biases; None: the user's default.
        id: id of the run, the same in every attempt of it; not empty.
        directory: the run directory.
        config: the resolved recipe.
    """

    project: str
    name: str | None
    entity: str | None
    id: str
    directory: str
    config: Mapping[str, Any]

    @property
    def shown_as(self) -> str:
        """The run's name."""
        return self.name or Path(self.directory).resolve().name


class Backend(Protocol):
    """One run of a tracker. Any exception is the tracker's own affair."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a step; steps grow."""
        ...

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log samples as a table; before the numbers of the same step."""
        ...

    def finish(self, *, failed: bool) -> None:
        """Send what is left."""
        ...


class Wandb:
    """Weights & Biases. ``WANDB_MODE=offline`` writes into the run directory, for ``wandb sync``.

    The id is the run's, so that another attempt goes on in the same run.
    """

    def __init__(self, identity: Identity) -> None:
        import wandb  # pyright: ignore[reportMissingImports] - optional, of an environment of its own

        self._wandb = wandb
        self._run = wandb.init(
            project=identity.project,
            entity=identity.entity,
            name=identity.shown_as,
            id=identity.id,
            resume="allow",
            dir=identity.directory,
            config=dict(identity.config),
            # What this process prints is no output of the run.
            settings=wandb.Settings(console="off", disable_code=True),
        )

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step, commit=True)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        table = self._wandb.Table(columns=list(rows[0]), data=[_cells(row) for row in rows])
        self._run.log({SAMPLES: table}, step=step, commit=False)

    def finish(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    """trackio, whose database is local unless ``TRACKIO_SPACE_ID`` or ``TRACKIO_SERVER_URL`` is set.

    It knows a run by its name, so that the name ends with the run's id: two runs of one name stay two.
    """

    def __init__(self, identity: Identity) -> None:
        import trackio  # pyright: ignore[reportMissingImports] - optional, of an environment of its own

        self._trackio = trackio
        self._run = trackio.init(
            project=identity.project,
            name=f"{identity.shown_as}-{identity.id[:8]}",
            resume="allow",
            config=dict(identity.config),
            embed=False,
        )

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        table = self._trackio.Table(columns=list(rows[0]), data=[_cells(row) for row in rows])
        self._run.log({SAMPLES: table}, step=step)

    def finish(self, *, failed: bool) -> None:
        self._run.finish()


BACKENDS: dict[str, type[Wandb] | type[Trackio]] = {"wandb": Wandb, "trackio": Trackio}


def _cells(row: Mapping[str, Any]) -> list[Any]:
    """Values of a row; of a model's text, which may be long and hold lone surrogates, what any encoding takes."""
    return [
        value[:CELL_LIMIT].encode(errors="replace").decode() if isinstance(value, str) else value
        for value in row.values()
    ]
