#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Evaluate a model on a node, with a process for each of its GPUs:
#
#   sbatch [--account=... --partition=... --time=...] slurm/eval.sh RECIPE [--model=DIR --data=SHARDS ...] [key=value ...]
#
# The arguments are those of `megatron-g2rpo eval`, which goes on where it was ended: the job may be requeued. DRYRUN,
# PYTHON, SRUN_ARGS and containers are as in slurm/train_g2rpo.sh.
#
#   NPROC=...     processes; default: the node's GPUs, or those of the recipe
#
#SBATCH --job-name=g2rpo-eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue

set -euo pipefail

program=eval.sh
cd "${SLURM_SUBMIT_DIR:-$PWD}" || { echo "$program: cannot enter the directory of submission, $SLURM_SUBMIT_DIR" >&2; exit 2; }
[ -f slurm/lib.sh ] || { echo "$program: $PWD is not the repository; submit from there" >&2; exit 2; }
# shellcheck source=slurm/lib.sh
source slurm/lib.sh

[ $# -ge 1 ] || fail "usage: sbatch slurm/eval.sh [RECIPE] [--model=DIR --data=SHARDS ...] [key=value ...]"
run_command eval "$@"
