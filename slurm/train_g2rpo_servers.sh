#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Train a G2RPO recipe with vLLM servers on nodes of their own: a heterogeneous job, whose first component is the
# trainer's nodes and whose second one the servers'.
#
#   sbatch [--nodes=N ...] [: --nodes=M ...] slurm/train_g2rpo_servers.sh RECIPE [key=value ...]
#
# The options before the colon are the trainer's, those after it the servers'; without a colon both get them all. The
# servers are started, awaited and, whatever happens, stopped here; the recipe's policy.generation.backend and
# vllm_server_cfg.addresses are set here. A server that ends is started again. Everything else is as in
# slurm/train_g2rpo.sh: read there about output, requeueing, CHAIN (not here: Slurm cannot chain such jobs by their
# options), STAGE_DATA, DRYRUN, PYTHON, LOGS and containers. Servers write to slurm-NAME-JOB/server_N.log.
#
#   SERVERS_PER_NODE=... default: GPUs of a server's node / policy.generation.vllm_cfg.tensor_parallel_size, at least 1
#   SERVER_PORT=8001     of the first server on each node; the next ones count up
#   SERVER_TIMEOUT=1800  seconds until all of them must have answered
#   SERVER_RESTARTS=3    how often each of them is started again
#   MEGATRON_G2RPO_API_KEY=... what they ask for; default: made here, for this job
#
#SBATCH --job-name=g2rpo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH hetjob
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue

set -euo pipefail

program=train_g2rpo_servers.sh
cd "${SLURM_SUBMIT_DIR:-$PWD}" || { echo "$program: cannot enter the directory of submission, $SLURM_SUBMIT_DIR" >&2; exit 2; }
[ -f slurm/lib.sh ] || { echo "$program: $PWD is not the repository; submit from there" >&2; exit 2; }
# shellcheck source=slurm/lib.sh
source slurm/lib.sh
# shellcheck source=slurm/servers.sh
source slurm/servers.sh

[ $# -ge 1 ] || fail "no recipe given; usage: sbatch slurm/train_g2rpo_servers.sh RECIPE [key=value ...]"
recipe=$1
shift
overrides=("$@")
[ -f "$recipe" ] || fail "recipe '$recipe' does not exist (working directory: $PWD)"
need_job
if [ -n "${SLURM_JOB_ID:-}" ] && [ "${SLURM_HET_SIZE:-1}" != 2 ]; then
  fail "the job has ${SLURM_HET_SIZE:-1} component(s), not the trainer's and the servers'"
fi
[ "${CHAIN:-1}" = 1 ] || fail "CHAIN is for slurm/train_g2rpo.sh; a job of two components goes on by requeueing"

[ -z "${SLURM_JOB_ID:-}" ] || het_group=(--het-group=0)
choose_python
choose_stage
choose_container
choose_logs
granted_by_slurm "${SLURM_JOB_NUM_NODES_HET_GROUP_0:-}"
choose_servers "${overrides[@]}"
[ "$verb" = train ] || fail "recipe '$recipe' is for sft, which samples nothing; use slurm/train_g2rpo.sh"

choose_rendezvous "${SLURM_JOB_NODELIST_HET_GROUP_0:-}"
server_command
overrides+=("${stage_overrides[@]}" "${server_overrides[@]}")
overrides+=(cluster.num_nodes="$num_nodes" cluster.gpus_per_node="$gpus_per_node")
train=("$PYTHON" -m megatron_g2rpo.cli "$verb" "$recipe" "${overrides[@]}")
trainer_command

if [ "$dryrun" = 1 ]; then
  [ -z "$assumed" ] || echo "# assumed: $assumed"
  show cd "$PWD"
  show export MASTER_ADDR="$MASTER_ADDR" MASTER_PORT="$MASTER_PORT"
  printf 'export MEGATRON_G2RPO_API_KEY=...\n'
  [ ${#stage[@]} = 0 ] || show "${stage[@]}"
  printf '%s&\n' "$(show "${serve[@]}")"
  printf '# until these answer /health: %s\n' "${addresses[*]}"
  show "${command[@]}"
  exit 0
fi

echo "$program: job $SLURM_JOB_ID, $num_nodes node(s) x $gpus_per_node process(es) at $MASTER_ADDR:$MASTER_PORT, and" \
  "${#addresses[@]} server(s)"
know_the_end
trap 'stop_servers; clean_up' EXIT
start_servers
stage_data
await_servers
run_step "${command[@]}"
stop_servers
requeue_if_stopped
exit "$code"
