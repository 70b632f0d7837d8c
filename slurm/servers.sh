# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# vLLM servers on the nodes of a heterogeneous job's second component; sourced after lib.sh.
# shellcheck disable=SC2034,SC2154

addresses=() server_overrides=() serve=() servers_step='' assumed=''

# choose_servers KEY=VALUE ...: read the recipe, and choose `addresses`, one for each server, and `server_overrides`, which
# name them.
choose_servers() {
  local hosts=localhost host number
  if [ -n "${SLURM_JOB_NODELIST_HET_GROUP_1:-}" ]; then
    hosts=$(hosts_of "$SLURM_JOB_NODELIST_HET_GROUP_1") || exit 2
  fi
  server_port=${SERVER_PORT:-8001}
  # The recipe is valid only with an address; the first is one in any case.
  server_overrides=(policy.generation.backend=vllm_server)
  server_overrides+=("policy.generation.vllm_server_cfg.addresses=['http://${hosts%%$'\n'*}:$server_port']")
  read_recipe "$@" "${granted[@]}" "${server_overrides[@]}"
  count_servers_per_node
  addresses=()
  for host in $hosts; do
    for ((number = 0; number < servers_per_node; number++)); do
      addresses+=("http://$host:$((server_port + number))")
    done
  done
  local listed
  listed=$(printf ", '%s'" "${addresses[@]}")
  server_overrides[1]="policy.generation.vllm_server_cfg.addresses=[${listed:2}]"
  server_nodes=$(wc -l <<<"$hosts")
}

# count_servers_per_node: as many as the GPUs of one of their nodes hold; outside a job `assumed` says what was taken.
count_servers_per_node() {
  local gpus
  servers_per_node=${SERVERS_PER_NODE:-}
  [ -z "$servers_per_node" ] || return 0
  if [ -n "${SLURM_JOB_ID:-}" ]; then
    # Also for a dry run, which prints what this job would run. Unset where the nodes have no GPUs that Slurm knows of.
    gpus=$(srun --het-group=1 --nodes=1 --ntasks=1 printenv SLURM_GPUS_ON_NODE 2>/dev/null) || gpus=0
  else
    gpus=$gpus_per_node
    assumed="one node of $gpus GPUs for the servers (cluster.gpus_per_node); a job takes what it is granted"
  fi
  servers_per_node=$((${gpus:-0} / engine_size))
  [ "$servers_per_node" -ge 1 ] || servers_per_node=1
}

# server_command: `serve`, which starts all servers.
server_command() {
  local extra group=()
  read -r -a extra <<<"${SRUN_ARGS:-}"
  [ -z "${SLURM_JOB_ID:-}" ] || group=(--het-group=1)
  serve=(
    srun "${group[@]}" --nodes="$server_nodes" --ntasks="$((server_nodes * servers_per_node))"
    --ntasks-per-node="$servers_per_node" --cpu-bind=none --kill-on-bad-exit=0 --wait=0
    "${container_args[@]}" "${extra[@]}" "${container_run[@]}"
    bash slurm/serve.sh "$logs" "$engine_size" "$server_port"
    "$PYTHON" -m megatron_g2rpo.cli serve "$recipe" "${overrides[@]}" "${server_overrides[@]}"
  )
}

# start_servers: in the background; without a key they would answer to everyone on the network.
start_servers() {
  if [ -z "${MEGATRON_G2RPO_API_KEY:-}" ]; then
    MEGATRON_G2RPO_API_KEY=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
  fi
  export MEGATRON_G2RPO_API_KEY
  command -v curl >/dev/null || fail "curl is needed on this node, to ask the servers for their health"
  export SERVER_RESTARTS=${SERVER_RESTARTS:-3}
  "${serve[@]}" &
  servers_step=$!
}

# await_servers: until each of them answers.
await_servers() {
  local end=$((SECONDS + ${SERVER_TIMEOUT:-1800})) address
  for address in "${addresses[@]}"; do
    until curl --silent --fail --max-time 5 --noproxy '*' --output /dev/null "$address/health"; do
      kill -0 "$servers_step" 2>/dev/null || fail "the servers have ended; see $logs/server_*.log"
      [ "$SECONDS" -lt "$end" ] ||
        fail "no answer from $address within ${SERVER_TIMEOUT:-1800} s (SERVER_TIMEOUT); see $logs/server_*.log"
      sleep 2
    done
  done
  echo "$program: all servers answer"
}

# stop_servers: srun ends its tasks, and what they have started.
stop_servers() {
  [ -n "$servers_step" ] || return 0
  kill -TERM "$servers_step" 2>/dev/null || true
  wait "$servers_step" 2>/dev/null || true
  servers_step=''
}
