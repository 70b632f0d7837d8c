#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Convert weights on a node, with a process for each of its GPUs:
#
#   sbatch [--account=... --partition=... --time=...] slurm/convert.sh import HF_DIR OUT [key=value ...]
#   sbatch [...]                                      slurm/convert.sh export CHECKPOINT OUT [key=value ...]
#
# The arguments are those of `megatron-g2rpo convert`; a target that exists is refused. DRYRUN, PYTHON, SRUN_ARGS and
# containers are as in slurm/train_g2rpo.sh.
#
#   NPROC=...     processes; default: the node's GPUs, or 1
#
#SBATCH --job-name=g2rpo-convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=slurm-%x-%j.out

set -euo pipefail

program=convert.sh
cd "${SLURM_SUBMIT_DIR:-$PWD}" || { echo "$program: cannot enter the directory of submission, $SLURM_SUBMIT_DIR" >&2; exit 2; }
[ -f slurm/lib.sh ] || { echo "$program: $PWD is not the repository; submit from there" >&2; exit 2; }
# shellcheck source=slurm/lib.sh
source slurm/lib.sh

case ${1:-} in
  import | export) ;;
  *) fail "usage: sbatch slurm/convert.sh import|export SOURCE OUT [key=value ...]" ;;
esac
run_command convert "$@"
