# SPDX-License-Identifier: Apache-2.0
"""A Slurm cluster of two nodes on this machine: its own key, daemons, ports and directory, and nothing of the system's.

The nodes are called 127.0.0.1 and 127.0.0.2, so that their names resolve everywhere. The daemons stay in the
foreground, as children of this process. Debian's ``slurm-wlm`` and ``munge`` are enough (``make test-slurm`` installs
them).

    python -m tests.slurm.cluster [FOLDER]    # starts one, says how to use it, and stops it with Ctrl-C
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.common.launch import ROOT

NODES = ("127.0.0.1", "127.0.0.2")
CPUS = 4  # of each node, on paper: how many ranks one may hold
START_SECONDS = 60
STOP_SECONDS = 60
_SBIN = "/usr/sbin:/sbin"


class Cluster:
    """A running cluster.

    Args:
        directory: where everything that it writes goes; it must not exist.

    Attributes:
        environment: what Slurm's commands need to find it, over this process's own environment.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # Whatever this process was started by must not look like a job of this cluster to what is submitted.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "MASTER_"))}
        self.environment = {
            **inherited,
            "PATH": f"{inherited['PATH']}:{_SBIN}",
            "SLURM_CONF": str(directory / "slurm.conf"),
        }
        self._daemons: list[tuple[str, subprocess.Popen[bytes]]] = []

    def start(self) -> None:
        """Start the daemons, and wait until both nodes are idle.

        Raises:
            RuntimeError: a daemon ended, or the nodes do not come up; the message holds the end of the logs.
        """
        missing = [name for name in ("munged", "slurmctld", "slurmd") if self._which(name) is None]
        if missing:
            raise RuntimeError(f"{', '.join(missing)} not found: `make test-slurm` installs slurm-wlm and munge")
        self.directory.mkdir(parents=True)
        for name in ("munge", "state", *(f"spool-{node}" for node in NODES)):
            (self.directory / name).mkdir(mode=0o755)
        self._write_configuration()
        try:
            self._start_daemons()
        except BaseException:
            self.stop()
            raise

    def _start_daemons(self) -> None:
        munge = self.directory / "munge"
        files = [
            f"--{name}={munge / name.replace('-', '.')}" for name in ("key-file", "log-file", "pid-file", "seed-file")
        ]
        self._daemon("munged", "--foreground", *files, f"--socket={munge / 'socket'}")
        self._await("munged's socket", (munge / "socket").exists)
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node, name=f"slurmd-{node}")
        self.wait_until_idle()

    def wait_until_idle(self) -> None:
        """Wait until both nodes could take a job.

        Raises:
            RuntimeError: they could not, after ``START_SECONDS``.
        """
        self._await("two idle nodes", lambda: self.text("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2")

    def start_requeued(self, job: str) -> None:
        """Let a requeued job start at once, which Slurm lets wait for two minutes.

        A node that has ended a job's first attempt refuses every credential of that job from the same second or before
        it: "already killed, do not launch batch job", and the job has failed. Slurm's two minutes hide that; one whole
        second after the last node has ended is as good.
        """
        self.wait_until_idle()
        time.sleep(1.1)
        self.text("scontrol", "update", f"JobId={job}", "StartTime=now")

    def stop(self) -> None:
        """Cancel what runs, end the daemons, and whatever they have left; safe to call more than once."""
        if any(name == "slurmctld" and process.poll() is None for name, process in self._daemons):
            self.run("scancel", f"--user={getpass.getuser()}")
            with contextlib.suppress(RuntimeError):
                self._await("an empty queue", lambda: not self.text("squeue", "-h"), STOP_SECONDS)
        for _, process in reversed(self._daemons):
            process.terminate()
        for _, process in reversed(self._daemons):
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._daemons.clear()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self) -> list[int]:
        """Return the processes that belong to the cluster: daemons, step managers, batch scripts and ranks."""
        mark = f"SLURM_CONF={self.directory / 'slurm.conf'}\0".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if mark in (entry / "environ").read_bytes() + b"\0":
                        found.append(int(entry.name))
        return found

    def run(self, *command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands from the repository, with ``variables`` added to its environment."""
        return subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def text(self, *command: str | Path, **variables: str) -> str:
        """Return what a command that must succeed prints."""
        done = self.run(*command, **variables)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}")
        return done.stdout

    def state(self, job: str) -> Mapping[str, str]:
        """Return what ``scontrol show job`` says of a job: ``JobState``, ``Restarts``, ``ExitCode`` and so on."""
        words = self.text("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, *states: str, seconds: float) -> Mapping[str, str]:
        """Wait until a job is in one of the states; return what ``state`` says then.

        Raises:
            RuntimeError: it is not, after so many seconds.
        """
        seen: Mapping[str, str] = {}

        def there() -> bool:
            nonlocal seen
            seen = self.state(job)
            return seen["JobState"] in states

        self._await(f"job {job} {' or '.join(states)}", there, seconds)
        return seen

    def _which(self, name: str) -> str | None:
        return shutil.which(name, path=self.environment["PATH"])

    def _write_configuration(self) -> None:
        key = self.directory / "munge" / "key.file"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        ports = iter(_free_ports(1 + len(NODES)))
        host, user = socket.gethostname(), getpass.getuser()
        settings = {
            "ClusterName": "g2rpo",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": next(ports),
            "SlurmUser": user,
            "SlurmdUser": user,
            "AuthType": "auth/munge",
            "CredType": "cred/munge",
            "AuthInfo": f"socket={self.directory / 'munge' / 'socket'}",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SwitchType": "switch/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "SlurmdParameters": "config_overrides",
            "StateSaveLocation": self.directory / "state",
            "SlurmdSpoolDir": f"{self.directory}/spool-%n",
            "SlurmctldPidFile": self.directory / "slurmctld.pid",
            "SlurmdPidFile": f"{self.directory}/slurmd-%n.pid",
            "ReturnToService": 2,
            "KillWait": 10,
            "MinJobAge": 3600,  # what a finished job was stays known
            "SchedulerParameters": "sched_interval=5,bf_interval=5",
        }
        lines = [f"{key}={value}" for key, value in settings.items()]
        for node in NODES:
            lines.append(
                f"NodeName={node} NodeAddr={node} NodeHostname={host} Port={next(ports)} CPUs={CPUS} State=UNKNOWN"
            )
        lines.append(f"PartitionName=all Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP")
        (self.directory / "slurm.conf").write_text("\n".join([*lines, ""]))

    def _daemon(self, *command: str, name: str | None = None) -> None:
        name = name or command[0]
        executable = self._which(command[0])
        assert executable is not None
        with (self.directory / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [executable, *command[1:]], env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._daemons.append((name, process))

    def _await(self, what: str, there: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ended = [name for name, process in self._daemons if process.poll() is not None]
            if ended:
                raise RuntimeError(f"{', '.join(ended)} ended:\n{self.logs()}")
            with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
                if there():
                    return
            time.sleep(0.3)
        raise RuntimeError(f"no {what} within {seconds:g} s:\n{self.text('squeue')}\n{self.logs()}")

    def logs(self) -> str:
        """Return the last lines of every daemon's log."""
        files = sorted(self.directory.glob("*.log"))
        return "\n".join(f"{file.name}: {file.read_text(errors='replace')[-1500:]}" for file in files)


@contextlib.contextmanager
def running(directory: Path) -> Iterator[Cluster]:
    """A cluster that is stopped in the end, whatever happens."""
    cluster = Cluster(directory)
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def main() -> None:
    """Start a cluster, and stop it when the terminal says so."""
    given = sys.argv[1:]
    directory = Path(given[0] if given else tempfile.mkdtemp(prefix="g2rpo-slurm-")) / "cluster"
    directory.parent.chmod(0o755)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with running(directory.resolve()) as cluster, contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        print(cluster.text("sinfo"), "Ctrl-C stops it.", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
