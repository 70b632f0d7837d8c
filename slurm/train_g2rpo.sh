#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Train a recipe on a Slurm cluster: one launcher (torchrun) per node, one process per GPU.
#
#   sbatch [--nodes=N] [--account=... --partition=... --time=...] slurm/train_g2rpo.sh RECIPE [key=value ...]
#
# Submit from the repository, on a file system that every node sees. The nodes and GPUs that Slurm grants replace the
# recipe's cluster.num_nodes and cluster.gpus_per_node.
#
#   DRYRUN=1      print the commands instead of running them; works without Slurm too:
#                 DRYRUN=1 bash slurm/train_g2rpo.sh RECIPE [key=value ...]
#   PYTHON=...    interpreter of the environment; default: .venv/bin/python if there is one, else python3
#   SRUN_ARGS=... more arguments for srun, split at spaces (containers, CPU binding)
#
#SBATCH --job-name=g2rpo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
# Whole nodes: all GPUs, cores and memory of each, however many it has.
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=slurm-%x-%j.out

set -euo pipefail

fail() {
  echo "train_g2rpo.sh: $1" >&2
  exit 2
}

# Slurm runs a copy of this file from its spool directory: only the directory of submission leads to the repository.
cd "${SLURM_SUBMIT_DIR:-$PWD}" || fail "cannot enter the directory of submission, ${SLURM_SUBMIT_DIR}"

[ $# -ge 1 ] || fail "no recipe given; usage: sbatch slurm/train_g2rpo.sh RECIPE [key=value ...]"
recipe=$1
shift
overrides=("$@")
[ -f "$recipe" ] || fail "recipe '$recipe' does not exist (working directory: $PWD)"

dryrun=${DRYRUN:-0}
if [ -z "${SLURM_JOB_ID:-}" ] && [ "$dryrun" != 1 ]; then
  fail "not inside a Slurm job; submit with sbatch, or set DRYRUN=1 to see the commands"
fi

if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=$PWD/.venv/bin/python
fi

# Load the recipe here, once, with what it imports: a mistake in it ends the job with one message, before hundreds of
# processes start.
read_cluster() {
  "$PYTHON" - "$recipe" "$@" <<'PY'
import sys

from megatron_g2rpo import recipe

try:
    cluster = recipe.load(sys.argv[1], sys.argv[2:], "train").cluster
except recipe.RecipeError as error:
    sys.exit(str(error))
print(cluster.num_nodes, cluster.gpus_per_node)
PY
}

granted=()
[ -n "${SLURM_NNODES:-}" ] && granted+=("cluster.num_nodes=$SLURM_NNODES")
# Unset, and 0 on some versions, where the nodes have no GPUs that Slurm knows of.
[ "${SLURM_GPUS_ON_NODE:-0}" != 0 ] && granted+=("cluster.gpus_per_node=$SLURM_GPUS_ON_NODE")
cluster=$(read_cluster "${overrides[@]}" "${granted[@]}") || fail "recipe '$recipe' cannot be used (see above)"
read -r num_nodes gpus_per_node <<<"$cluster"

# Rendezvous on the job's first node, on a port that two jobs on one node will hardly share. The range lies below the
# ports that Linux hands out by itself (32768 and up).
job_id=${SLURM_JOB_ID:-0}
MASTER_PORT=${MASTER_PORT:-$((20000 + job_id % 12000))}
if [ -z "${MASTER_ADDR:-}" ]; then
  MASTER_ADDR=localhost
  if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || fail "scontrol does not know the nodes $SLURM_JOB_NODELIST"
    MASTER_ADDR=${hosts%%$'\n'*}
  fi
fi

read -r -a srun_args <<<"${SRUN_ARGS:-}"
# --cpu-bind=none: a node's processes share its one task, which must not be bound to a single core.
command=(
  srun --nodes="$num_nodes" --ntasks="$num_nodes" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1
  "${srun_args[@]}"
  "$PYTHON" -m torch.distributed.run
  --nnodes="$num_nodes" --nproc-per-node="$gpus_per_node" --max-restarts=0
  --rdzv-backend=c10d --rdzv-id="$job_id" --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT"
  -m megatron_g2rpo.cli train "$recipe" "${overrides[@]}"
  cluster.num_nodes="$num_nodes" cluster.gpus_per_node="$gpus_per_node"
)

if [ "$dryrun" = 1 ]; then
  printf 'cd %q\n' "$PWD"
  printf '%q ' "${command[@]}"
  printf '\n'
  exit 0
fi

echo "job $job_id: $num_nodes node(s) x $gpus_per_node process(es), rendezvous at $MASTER_ADDR:$MASTER_PORT"
exec "${command[@]}"
