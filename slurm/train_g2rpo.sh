#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Train a recipe on a Slurm cluster, one process per GPU. The recipe says which loop: its section is grpo or sft.
#
#   sbatch [--nodes=N] [--account=... --partition=... --time=...] slurm/train_g2rpo.sh RECIPE [key=value ...]
#
# Submit from the repository, on a file system that every node sees. The nodes and GPUs that Slurm grants replace the
# recipe's cluster.num_nodes and cluster.gpus_per_node. Output: slurm-NAME-JOB.out, all ranks merged, each line with its
# rank; slurm-NAME-JOB/rank_N.log, each rank's own. Before the time limit, or when it is preempted, the run is saved, and
# the job requeued; the same command goes on as well.
#
#   DRYRUN=1      print the commands instead of running them; works without Slurm too:
#                 DRYRUN=1 bash slurm/train_g2rpo.sh RECIPE [key=value ...]
#                 Outside a job the layout is the recipe's cluster. Data and model are not looked at: train --dry-run
#   CHAIN=5       five jobs, one after the other, in the place of requeueing: each goes on where the last one ended
#   REQUEUE=0     end with code 75 in the place of requeueing
#   STAGE_DATA=1  copy the data to each node's own disk first: STAGE_DIR, default $SLURM_TMPDIR or /tmp
#   PYTHON=...    interpreter of the environment; default: .venv/bin/python if there is one, else python3
#   LOGS=...      folder for the logs of ranks; default: that of submission
#   CONTAINER_IMAGE=... CONTAINER_MOUNTS=FROM:TO,... CONTAINER_RUNTIME=pyxis|apptainer; the repository is mounted
#   SRUN_ARGS=... more arguments for srun, split at spaces; SBATCH_ARGS=... for sbatch, of the other jobs of a chain
#
#SBATCH --job-name=g2rpo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
# Whole nodes: all GPUs, cores and memory of each, however many it has.
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# Seconds before the end at which this script is told.
#SBATCH --signal=B:USR1@120

set -euo pipefail

program=train_g2rpo.sh
# Slurm runs a copy of this file from its spool directory: only the directory of submission leads to the repository.
cd "${SLURM_SUBMIT_DIR:-$PWD}" || { echo "$program: cannot enter the directory of submission, $SLURM_SUBMIT_DIR" >&2; exit 2; }
[ -f slurm/lib.sh ] || { echo "$program: $PWD is not the repository; submit from there" >&2; exit 2; }
# shellcheck source=slurm/lib.sh
source slurm/lib.sh

[ $# -ge 1 ] || fail "no recipe given; usage: sbatch slurm/train_g2rpo.sh RECIPE [key=value ...]"
recipe=$1
shift
overrides=("$@")
[ -f "$recipe" ] || fail "recipe '$recipe' does not exist (working directory: $PWD)"
need_job

choose_python
choose_stage
choose_container
choose_logs
granted_by_slurm "${SLURM_NNODES:-}"
read_recipe "${overrides[@]}" "${granted[@]}"

if [ "${CHAIN:-1}" -gt 1 ]; then
  # Before any job is submitted that would find nothing to do. In what a dry run prints it is a comment.
  if [ "$finished" = 1 ]; then
    [ "$dryrun" != 1 ] || printf '# '
    echo "$program: the run is finished; nothing is left for this job of the chain"
    exit 0
  fi
  chain "$recipe" "${overrides[@]}"
fi

choose_rendezvous "${SLURM_JOB_NODELIST:-}"
overrides+=("${stage_overrides[@]}" cluster.num_nodes="$num_nodes" cluster.gpus_per_node="$gpus_per_node")
train=("$PYTHON" -m megatron_g2rpo.cli "$verb" "$recipe" "${overrides[@]}")
trainer_command

if [ "$dryrun" = 1 ]; then
  show cd "$PWD"
  show export MASTER_ADDR="$MASTER_ADDR" MASTER_PORT="$MASTER_PORT"
  [ ${#stage[@]} = 0 ] || show "${stage[@]}"
  show "${command[@]}"
  exit 0
fi

echo "$program: job $SLURM_JOB_ID, $verb on $num_nodes node(s) x $gpus_per_node process(es), at $MASTER_ADDR:$MASTER_PORT"
know_the_end
trap clean_up EXIT
stage_data
run_step "${command[@]}"
requeue_if_stopped
exit "$code"
