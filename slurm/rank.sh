#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# One rank of a step, as srun starts it on every node:  rank.sh LOGS COMMAND [ARGUMENT ...]
#
# Its output goes to LOGS/rank_N.log and, with srun's label, into the job's merged output. Exit code 75 of the trainer
# means that it was stopped in order, and has saved: a mark in LOGS says so, and the step ends with 0, so that
# --kill-on-bad-exit does not end ranks that are still leaving.
set -u

logs=$1
shift
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=$((SLURM_STEP_NUM_TASKS / SLURM_STEP_NUM_NODES))
# By which the trainer knows that it has lost this script (megatron_g2rpo/processes/launcher.py).
MEGATRON_G2RPO_LAUNCHER=$$@$(readlink /proc/self/ns/pid) && export MEGATRON_G2RPO_LAUNCHER
mkdir -p "$logs"

# A signal that Slurm sends to the step reaches the trainer by itself; this script outlives it. SIGURG is the batch
# script's: it is passed on to the trainer alone, as SIGUSR2, of which the trainer takes any number for one request.
asked=0 trainer=''
trap 'asked=1 interrupted=1' USR1 TERM INT HUP
trap '[ -z "$trainer" ] || kill -USR2 "$trainer"; asked=1 interrupted=1' URG

# tee must live until the trainer has said its last word.
"$@" > >(trap '' USR1 USR2 TERM INT HUP URG; exec tee -a "$logs/rank_$RANK.log") 2>&1 &
trainer=$!
[ "$asked" = 0 ] || kill -USR2 "$trainer" # asked before it was there
interrupted=1
while [ "$interrupted" = 1 ]; do # a trap ends the wait, not the trainer
  interrupted=0
  wait "$trainer" && code=0 || code=$?
done

# Ended by the request itself, USR1 or USR2: Python had not yet come to where it minds them, and nothing is lost.
if [ "$asked" = 1 ] && { [ "$code" = 138 ] || [ "$code" = 140 ]; }; then
  code=75
fi
if [ "$code" = 75 ]; then
  # One mark for the whole step, by the rank that runs beside the batch script.
  [ "$RANK" != 0 ] || : >"$logs/stopped"
  exit 0
fi
if [ "$code" -gt 128 ]; then
  echo "rank $RANK on ${SLURMD_NODENAME:-$HOSTNAME} was ended by signal $((code - 128))" | tee -a "$logs/rank_$RANK.log" >&2
elif [ "$code" != 0 ]; then
  echo "rank $RANK on ${SLURMD_NODENAME:-$HOSTNAME} ended with code $code" | tee -a "$logs/rank_$RANK.log" >&2
fi
exit "$code"
