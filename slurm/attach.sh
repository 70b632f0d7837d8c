#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Look into a running job, on one of its nodes, without disturbing it:
#
#   slurm/attach.sh JOB                    a shell on the job's first node
#   slurm/attach.sh JOB NODE               ... on a node of that name
#   slurm/attach.sh JOB NODE COMMAND ...   a command there; NODE may be - for the first
#   slurm/attach.sh JOB logs               follow all ranks' output
#
# DRYRUN=1 prints the command.

set -euo pipefail

program=attach.sh
fail() {
  echo "$program: $1" >&2
  exit 2
}

[ $# -ge 1 ] || fail "usage: slurm/attach.sh JOB [logs | NODE [COMMAND ...]]"
job=$1
shift

command -v squeue >/dev/null || fail "squeue is not found; this is for a machine from which Slurm can be asked"

# A field of the job, as squeue says it; of a heterogeneous job, of its first component.
field() {
  squeue --noheader --jobs="$job" --states=RUNNING --format="$1" 2>/dev/null | sed -n 1p
}

nodes=$(field %N) || nodes=''
[ -n "$nodes" ] || fail "job $job is not running"

if [ "${1:-}" = logs ]; then
  # The merged output, as the job was told to write it.
  output=$(scontrol show job "$job" | sed -n 's/^ *StdOut=//p' | sed -n 1p)
  command=(tail -n 100 -F "$output")
else
  node=${1:--}
  if [ "$node" = - ]; then
    node=$(scontrol show hostnames "$nodes" | sed -n 1p)
  fi
  [ $# = 0 ] || shift
  command=(srun --jobid="$job" --overlap --nodes=1 --ntasks=1 --nodelist="$node" --cpu-bind=none)
  if [ $# = 0 ]; then
    command+=(--pty "${SHELL:-bash}")
  else
    command+=("$@")
  fi
fi

if [ "${DRYRUN:-0}" = 1 ]; then
  printf '%q ' "${command[@]}"
  printf '\n'
  exit 0
fi
exec "${command[@]}"
