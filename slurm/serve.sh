#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# One server, as srun starts it:  serve.sh LOGS GPUS PORT COMMAND [ARGUMENT ...]
#
# It takes GPUs of this node's, by its turn among the tasks there, and listens on PORT plus that turn. A server that ends
# is started again, SERVER_RESTARTS times: the trainer gives it the weights with its next step.
set -u

logs=$1 gpus=$2 port=$(($3 + SLURM_LOCALID))
shift 3
mkdir -p "$logs"
exec >>"$logs/server_$SLURM_PROCID.log" 2>&1

if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
  IFS=, read -r -a devices <<<"$CUDA_VISIBLE_DEVICES"
  mine=("${devices[@]:SLURM_LOCALID * gpus:gpus}")
  CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${mine[*]}")
  export CUDA_VISIBLE_DEVICES
fi

for ((attempt = 0; attempt <= ${SERVER_RESTARTS:-3}; attempt++)); do
  "$@" --host 0.0.0.0 --port "$port"
  code=$?
  echo "$(date +%FT%T) server $SLURM_PROCID on ${SLURMD_NODENAME:-$HOSTNAME}:$port ended with code $code"
done
exit 1
