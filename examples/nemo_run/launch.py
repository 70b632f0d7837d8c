# SPDX-License-Identifier: Apache-2.0
"""A recipe as a nemo-run experiment on Slurm: the trainer alone, or beside vLLM servers on nodes of their own.

    python examples/nemo_run/launch.py train RECIPE [key=value ...] --account A --nodes 8 --gpus-per-node 8
    python examples/nemo_run/launch.py train RECIPE [...] --account A --nodes 8 --server-nodes 2 --engine-gpus 4

Prints the batch script and what it starts; ``--submit`` submits it, from a login node. Run it in the repository, on a
file system that every node sees, in an environment that has nemo-run (``constraints/nemo-run.txt``); this package is
needed on the nodes only. With ``--server-nodes`` the job is heterogeneous: component 0 is the trainer's nodes,
component 1 the servers', one for each ``--engine-gpus`` GPUs.

The programs on the nodes are those of ``slurm/``: ``rank.sh`` starts a rank and ``serve.sh`` a server, and of
``lib.sh`` come the rendezvous and what becomes of a job that was stopped and has saved: it is requeued, as often as it
takes. What nemo-run would do, a number of retries after any error, is not asked for.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path

# pyright, which has no nemo-run, takes this folder for it.
# pyright: reportAttributeAccessIssue=false
from nemo_run import Experiment, LocalTunnel, Packager, Script, SlurmExecutor

HEAD = "set -euo pipefail\ncd {workdir}"
FIRST_PORT = 8001


@dataclass(frozen=True)
class Job:
    """What to start.

    Attributes:
        verb: ``train`` or ``sft``.
        recipe: path, as the nodes see it from ``workdir``.
        overrides: ``key=value`` each.
        nodes: of the trainer.
        processes: ranks on each of them, one a GPU.
        server_nodes: of vLLM servers; 0: none.
        engine_gpus: GPUs of one server.
        has_gpus: whether to ask Slurm for GPUs.
        workdir: the repository.
        python: interpreter on the nodes.
    """

    verb: str
    recipe: str
    overrides: tuple[str, ...]
    nodes: int
    processes: int
    server_nodes: int
    engine_gpus: int
    has_gpus: bool
    workdir: Path
    python: str

    @property
    def servers_per_node(self) -> int:
        """Number of servers on each of their nodes."""
        return self.processes // self.engine_gpus

    def command(self, verb: str, *more: str) -> str:
        """Return the line of a shell that becomes a verb of ours; ``more`` is text of a shell, not quoted here."""
        program = [self.python, "-m", "megatron_g2rpo.cli", verb, self.recipe, *self.overrides]
        if self.server_nodes:
            program += ["policy.generation.backend=vllm_server"]
            program += [f"policy.generation.vllm_cfg.tensor_parallel_size={self.engine_gpus}"]
            more = ('policy.generation.vllm_server_cfg.addresses="$G2RPO_SERVERS"', *more)
        return " ".join([shlex.join(program), *more])


def setup(job: Job) -> str:
    """Return what the batch script does before it starts anything.

    It is told of its end by SIGUSR1, and tells the ranks' scripts by SIGURG, which ends nothing else of the step. The
    key of the servers is made where the script's trace does not show it.
    """
    trainer = "SLURM_JOB_NODELIST_HET_GROUP_0" if job.server_nodes else "SLURM_JOB_NODELIST"
    lines = [
        f"cd {shlex.quote(str(job.workdir))} || exit 2",
        "program=launch.py",
        "source slurm/lib.sh",
        "choose_logs",
        'export G2RPO_LOGS="$logs"',
        f'choose_rendezvous "${trainer}"',
        "know_the_end",
        'rm -f "$logs/stopped"',
        "trap 'scancel --quiet --signal=URG \"$SLURM_JOB_ID\"' USR1 TERM",
        "trap 'code=$?; requeue_if_stopped; exit $code' EXIT",
    ]
    if job.server_nodes:
        ports = range(FIRST_PORT, FIRST_PORT + job.servers_per_node)
        lines += [
            "G2RPO_SERVERS=''",
            'for host in $(hosts_of "$SLURM_JOB_NODELIST_HET_GROUP_1"); do',
            f"  for port in {' '.join(map(str, ports))}; do G2RPO_SERVERS+=\", 'http://$host:$port'\"; done",
            "done",
            'export G2RPO_SERVERS="[${G2RPO_SERVERS:2}]"',
            "{ set +vx; } 2>/dev/null",
            "MEGATRON_G2RPO_API_KEY=${MEGATRON_G2RPO_API_KEY:-$(od -An -N24 -tx1 /dev/urandom | tr -d ' \\n')}",
            "export MEGATRON_G2RPO_API_KEY",
            "set -vx",
        ]
    return "\n".join(lines)


def training(job: Job) -> str:
    """Return the script of one rank."""
    lines = [HEAD.format(workdir=shlex.quote(str(job.workdir)))]
    if job.server_nodes:
        lines += [
            "end=$((SECONDS + ${SERVER_TIMEOUT:-1800}))",
            'for address in $(tr -d "[],\'" <<<"$G2RPO_SERVERS"); do',
            '  until curl --silent --fail --max-time 5 --noproxy "*" --output /dev/null "$address/health"; do',
            '    [ "$SECONDS" -ge "$end" ] || { sleep 5; continue; }',
            '    echo "no answer from $address; see $G2RPO_LOGS/server_*.log" >&2',
            "    exit 1",
            "  done",
            "done",
        ]
    cluster = (f"cluster.num_nodes={job.nodes}", f"cluster.gpus_per_node={job.processes}")
    lines.append(f'exec bash slurm/rank.sh "$G2RPO_LOGS" {job.command(job.verb, *cluster)}')
    return "\n".join(lines) + "\n"


def serving(job: Job) -> str:
    """Return the script of one server."""
    head = HEAD.format(workdir=shlex.quote(str(job.workdir)))
    return f'{head}\nexec bash slurm/serve.sh "$G2RPO_LOGS" {job.engine_gpus} {FIRST_PORT} {job.command("serve")}\n'


def executor(job: Job, settings: argparse.Namespace, *, servers: bool = False) -> SlurmExecutor:
    """Return where a script runs: the trainer's nodes, or the servers'."""
    nodes, tasks = (job.server_nodes, job.servers_per_node) if servers else (job.nodes, job.processes)
    mounts = [f"{job.workdir}:{job.workdir}", *settings.container_mounts] if settings.container_image else []
    step = [f"--nodes={nodes}", f"--ntasks={nodes * tasks}", f"--ntasks-per-node={tasks}", "--cpu-bind=none"]
    # After nemo-run's own, and the last one counts: a server is started again, and ends without ending the others.
    step += ["--kill-on-bad-exit=0", "--wait=0"] if servers else ["--label"]
    return SlurmExecutor(
        account=settings.account,
        partition=settings.partition,
        qos=settings.qos,
        time=settings.time,
        nodes=nodes,
        ntasks_per_node=tasks,
        gpus_per_node=job.processes if job.has_gpus else None,
        exclusive=True,
        mem="0",
        signal="B:USR1@120",
        container_image=settings.container_image,
        container_mounts=mounts,
        srun_args=step,
        setup_lines=setup(job),
        heterogeneous=bool(job.server_nodes),
        wait_time_for_group_job=0,
        monitor_group_job_wait_time=5,
        retries=0,
        # The nodes see the repository itself.
        packager=Packager(),
        # Where the experiment's own folder is: nothing is copied.
        tunnel=LocalTunnel(job_dir=str(settings.job_dir.absolute() / "experiments")),
    )


def main() -> None:
    """Print the batch script, or submit it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("train", "sft"))
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--name", default="g2rpo", help="of the experiment and the job")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8, help="of all nodes; one rank a GPU")
    parser.add_argument("--server-nodes", type=int, default=0, help="nodes of vLLM servers; 0: none")
    parser.add_argument("--engine-gpus", type=int, default=1, help="GPUs of one server")
    parser.add_argument("--cpu", action="store_true", help="ask for no GPUs; --gpus-per-node is then ranks a node")
    parser.add_argument("--account", required=True)
    parser.add_argument("--partition")
    parser.add_argument("--qos")
    parser.add_argument("--time", default="04:00:00", help="after which the run is saved and the job requeued")
    parser.add_argument("--container-image", help="for pyxis; without it the programs run as they are on the nodes")
    parser.add_argument("--container-mounts", action="append", default=[], metavar="FROM:TO")
    parser.add_argument("--python", help="on the nodes; default: .venv/bin/python, in a container python3")
    parser.add_argument("--workdir", type=Path, default=Path.cwd(), help="the repository, as the nodes see it")
    parser.add_argument("--job-dir", type=Path, default=Path.cwd() / "runs" / "nemo_run", help="for nemo-run's files")
    parser.add_argument("--submit", action="store_true")
    settings = parser.parse_intermixed_args()
    if settings.server_nodes and settings.verb == "sft":
        parser.error("sft samples nothing: it needs no servers")
    if settings.server_nodes and not 1 <= settings.engine_gpus <= settings.gpus_per_node:
        parser.error("--engine-gpus must be from 1 to --gpus-per-node: a server lies within a node")
    job = Job(
        verb=settings.verb,
        recipe=settings.recipe,
        overrides=tuple(settings.overrides),
        nodes=settings.nodes,
        processes=settings.gpus_per_node,
        server_nodes=settings.server_nodes,
        engine_gpus=settings.engine_gpus,
        has_gpus=not settings.cpu,
        workdir=settings.workdir.absolute(),
        python=settings.python or ("python3" if settings.container_image else ".venv/bin/python"),
    )
    # Always a group, of one if need be: its steps run in the background, so that the batch script hears signals.
    tasks = [Script(inline=training(job))]
    executors = [executor(job, settings)]
    if job.server_nodes:
        tasks.append(Script(inline=serving(job)))
        executors.append(executor(job, settings, servers=True))
    with Experiment(settings.name, base_dir=str(settings.job_dir.absolute())) as experiment:
        experiment.add(tasks, executor=executors, name=settings.name)
        if settings.submit:
            experiment.run(detach=True)
            return
        experiment.dryrun(log=False, delete_exp_dir=False)
    # nemo-run's own listing breaks lines at 80 characters.
    folder = max(settings.job_dir.glob(f"experiments/{settings.name}/*/"), key=lambda each: each.stat().st_mtime)
    for script in (*folder.glob("*_sbatch.sh"), *sorted(folder.glob("*/scripts/*.sh"))):
        print(f"# {script}\n{script.read_text()}")


if __name__ == "__main__":
    main()
