# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# What the batch scripts share; sourced, in the directory of submission. Variables that a user sets in the environment
# are in capitals, and listed at the top of each script; those that functions and scripts hand each other come here.
# shellcheck disable=SC2034

dryrun=${DRYRUN:-0}
program=${program:-lib.sh}      # name of the script, for messages
recipe=''                       # path
het_group=()                    # srun's argument for the nodes of the trainer, in a heterogeneous job
verb='' num_nodes='' gpus_per_node='' engine_size='' finished='' # of slurm/recipe_facts.py
container_args=() container_run=()
train=() command=()             # what a rank runs; what starts all of them
stage_dir='' stage=() staged=() stage_overrides=() stage_done=0
next_job='' logs='' code=0

# fail MESSAGE: end the job before anything is started.
fail() {
  echo "$program: $1" >&2
  exit 2
}

# need_job: refuse to run outside of a job, but for a dry run.
need_job() {
  [ -n "${SLURM_JOB_ID:-}" ] || [ "$dryrun" = 1 ] ||
    fail "not inside a Slurm job; submit with sbatch, or set DRYRUN=1 to see the commands"
}

# choose_python: PYTHON, and `host_python`, which reads the recipe where no container can be started.
choose_python() {
  host_python=python3
  [ -x .venv/bin/python ] && host_python=$PWD/.venv/bin/python
  if [ -n "${CONTAINER_IMAGE:-}" ]; then
    PYTHON=${PYTHON:-python3} # a path of this machine says nothing inside
  else
    PYTHON=${PYTHON:-$host_python}
    host_python=$PYTHON
  fi
}

# choose_container: `container_args` for srun (pyxis), or `container_run` before the program (apptainer).
choose_container() {
  [ -n "${CONTAINER_IMAGE:-}" ] || return 0
  local mounts=$PWD:$PWD
  [ -n "${CONTAINER_MOUNTS:-}" ] && mounts+=,$CONTAINER_MOUNTS
  [ -n "${stage_dir:-}" ] && mounts+=,${stage_dir%/*}:${stage_dir%/*}
  case ${CONTAINER_RUNTIME:-pyxis} in
    pyxis)
      container_args=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts" --container-workdir="$PWD")
      ;;
    apptainer)
      container_run=(apptainer exec --pwd "$PWD" --bind "$mounts")
      [ "${SLURM_GPUS_ON_NODE:-0}" != 0 ] && container_run+=(--nv)
      container_run+=("$CONTAINER_IMAGE")
      ;;
    *) fail "CONTAINER_RUNTIME=$CONTAINER_RUNTIME is neither pyxis nor apptainer" ;;
  esac
}

# read_recipe KEY=VALUE ...: load `recipe` once, with what it imports, and set what slurm/recipe_facts.py prints. A
# mistake in it ends the job with one message, before hundreds of processes start.
read_recipe() {
  local reader=("$host_python") facts
  if [ -n "${CONTAINER_IMAGE:-}" ] && [ "$dryrun" != 1 ]; then
    reader=(srun --nodes=1 --ntasks=1 "${het_group[@]}" "${container_args[@]}" "${container_run[@]}" "$PYTHON")
  fi
  facts=$("${reader[@]}" - "$recipe" "${stage_dir:-}" "$@" <slurm/recipe_facts.py) ||
    fail "recipe '$recipe' cannot be used (see above)"
  # Quoted for a shell by the program that wrote it.
  eval "$facts"
}

# granted_by_slurm [NODES]: `granted`, the overrides that make the recipe's cluster the one that Slurm has granted.
granted_by_slurm() {
  granted=()
  [ -n "${1:-}" ] && granted+=("cluster.num_nodes=$1")
  # Unset, and 0 on some versions, where the nodes have no GPUs that Slurm knows of.
  [ "${SLURM_GPUS_ON_NODE:-0}" != 0 ] && granted+=("cluster.gpus_per_node=$SLURM_GPUS_ON_NODE")
  return 0
}

# hosts_of NODELIST: their names, one a line.
hosts_of() {
  scontrol show hostnames "$1" || fail "scontrol does not know the nodes $1"
}

# choose_rendezvous [NODELIST]: the first node, and a port that two jobs on one node will hardly share. The range lies
# below the ports that Linux hands out by itself (32768 and up).
choose_rendezvous() {
  local hosts=localhost
  if [ -z "${MASTER_ADDR:-}" ] && [ -n "${1:-}" ]; then
    hosts=$(hosts_of "$1") || exit 2
  fi
  export MASTER_ADDR=${MASTER_ADDR:-${hosts%%$'\n'*}}
  export MASTER_PORT=${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 12000))}
}

# choose_logs: `logs`, the folder of this job's files, beside its merged output.
choose_logs() {
  logs=${LOGS:-$PWD}/slurm-${SLURM_JOB_NAME:-g2rpo}-${SLURM_JOB_ID:-0}
}

# know_the_end: Slurm before 23.02 does not tell a job when its time is up; the trainer saves before.
know_the_end() {
  [ -z "${SLURM_JOB_END_TIME:-}" ] || return 0
  local end
  end=$(squeue --noheader --jobs="$SLURM_JOB_ID" --Format=EndTime:32 2>/dev/null | sed -n 1p) || return 0
  # Without a time limit it says N/A.
  end=$(date --date="${end// /}" +%s 2>/dev/null) || return 0
  export SLURM_JOB_END_TIME=$end
}

# show COMMAND ...: one line that can be pasted.
show() {
  printf '%q ' "$@"
  printf '\n'
}

# run_step COMMAND ...: run srun in the background and wait for it, passing on what the job is told. Sets `code`.
#
# Slurm hands a signal to every process of a step, and most that a rank starts (workers, an engine) would die of it. So
# the ranks' scripts are sent SIGURG, which ends nothing, and pass it on to the trainer alone.
run_step() {
  local step interrupted
  rm -f "$logs/stopped" # of an earlier attempt that failed after all
  "$@" &
  step=$!
  trap 'interrupted=1
        echo "$program: asked to stop; the ranks are told to save and leave" >&2
        scancel --quiet --signal=URG "$SLURM_JOB_ID"' USR1 TERM
  interrupted=1
  while [ "$interrupted" = 1 ]; do # a trap ends the wait, not the step
    interrupted=0
    wait "$step" && code=0 || code=$?
  done
  trap - TERM
  trap '' USR1
}

# requeue_if_stopped: after `run_step`. A run that was stopped in order has left a mark; it goes on in the next job.
requeue_if_stopped() {
  if [ "$code" != 0 ] || [ ! -e "$logs/stopped" ]; then
    return 0
  fi
  rm -f "$logs/stopped"
  code=75
  if [ -n "${next_job:-}" ]; then
    echo "$program: the run was stopped and saved; the next job of the chain goes on"
    code=0
    return 0
  fi
  if [ "${REQUEUE:-1}" != 1 ]; then
    echo "$program: the run was stopped and saved; the same command goes on (REQUEUE=$REQUEUE)"
    return 0
  fi
  # Slurm would also requeue a job that its user has cancelled.
  local state
  state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null | sed -n 1p) || state=''
  if [ "$state" != RUNNING ]; then
    echo "$program: the run was stopped and saved; the job is ${state:-gone}, so it is not requeued"
    return 0
  fi
  echo "$program: the run was stopped and saved; the job is requeued"
  clean_up
  scontrol requeue "$SLURM_JOB_ID" || return 0
  # Slurm ends this script. Leaving by itself it would finish the job.
  sleep 300
}

# choose_stage: `stage_dir`, the folder on each node's own disk that STAGE_DATA=1 copies the data to; else empty.
choose_stage() {
  [ "${STAGE_DATA:-0}" = 1 ] || return 0
  stage_dir=${STAGE_DIR:-${SLURM_TMPDIR:-/tmp}}/g2rpo-data-${SLURM_JOB_ID:-0}
}

# stage_data: copy the data, by one task a node.
stage_data() {
  [ ${#stage[@]} = 0 ] && return 0
  stage_done=1
  "${stage[@]}" || fail "the data could not be copied to $stage_dir of every node (see above)"
}

# clean_up: remove what was staged. The folder has this job's number, and was made by it.
clean_up() {
  [ "$stage_done" = 1 ] || return 0
  stage_done=0
  srun "${het_group[@]}" --nodes="$num_nodes" --ntasks="$num_nodes" --ntasks-per-node=1 rm -rf -- "$stage_dir" || true
}

# trainer_command: `command`, which starts `train` on every node, and `stage`, which copies the data before.
trainer_command() {
  local extra
  read -r -a extra <<<"${SRUN_ARGS:-}"
  # --cpu-bind=none: every rank shares the cores of its node with the others, and with the engine's threads.
  command=(
    srun "${het_group[@]}" --nodes="$num_nodes" --ntasks="$((num_nodes * gpus_per_node))"
    --ntasks-per-node="$gpus_per_node" --cpu-bind=none --kill-on-bad-exit=1 --label
    "${container_args[@]}" "${extra[@]}" "${container_run[@]}"
    bash slurm/rank.sh "$logs" "${train[@]}"
  )
  [ -z "$stage_dir" ] || stage=(
    srun "${het_group[@]}" --nodes="$num_nodes" --ntasks="$num_nodes" --ntasks-per-node=1 --kill-on-bad-exit=1
    bash slurm/stage.sh "${staged[@]}"
  )
}

# chain RECIPE [OVERRIDE ...]: in the first of CHAIN jobs, submit the others, each to start when the one before it has
# ended in whatever way. They get this job's options, as far as Slurm says them; SBATCH_ARGS adds what it does not.
chain() {
  local link=${CHAIN_LINK:-1} previous=${SLURM_JOB_ID:-JOB} options=() extra submit number
  [ "$link" -ge "$CHAIN" ] || next_job=yes
  REQUEUE=0 # the next job goes on
  if [ "$link" != 1 ] || [ "${SLURM_RESTART_COUNT:-0}" != 0 ]; then
    return 0
  fi
  options_of_this_job
  read -r -a extra <<<"${SBATCH_ARGS:-}"
  for ((number = 2; number <= CHAIN; number++)); do
    submit=(
      sbatch --parsable --dependency="afterany:$previous" "--export=ALL,CHAIN_LINK=$number"
      "${options[@]}" "${extra[@]}" "slurm/$program" "$@"
    )
    if [ "$dryrun" = 1 ]; then
      show "${submit[@]}"
      previous=JOB$number
      continue
    fi
    previous=$("${submit[@]}") || fail "job $number of the chain could not be submitted"
    previous=${previous%%;*}
    echo "$program: job $previous goes on after this one ($number of $CHAIN)"
  done
}

# options_of_this_job: fill `options` (of the caller) with sbatch's options for a job like this one.
options_of_this_job() {
  [ -n "${SLURM_JOB_ID:-}" ] || return 0
  local names=(nodes partition account qos time constraint reservation job-name gres) values index value
  IFS='|' read -r -a values < <(squeue --noheader --jobs="$SLURM_JOB_ID" --format='%D|%P|%a|%q|%l|%f|%v|%j|%b')
  for index in "${!names[@]}"; do
    value=${values[index]:-}
    value=${value#gres[:/]}
    case $value in '' | N/A | '(null)') continue ;; esac
    options+=("--${names[index]}=$value")
  done
}

# run_command VERB ...: become a command of one node, which starts its processes itself.
run_command() {
  local processes=${NPROC:-${SLURM_GPUS_ON_NODE:-0}} extra
  need_job
  choose_python
  choose_container
  read -r -a extra <<<"${SRUN_ARGS:-}"
  command=(
    srun --nodes=1 --ntasks=1 --cpu-bind=none "${container_args[@]}" "${extra[@]}" "${container_run[@]}"
    "$PYTHON" -m megatron_g2rpo.cli "$@"
  )
  [ "$processes" = 0 ] || command+=(--nproc "$processes")
  if [ "$dryrun" = 1 ]; then
    [ -n "${SLURM_JOB_ID:-}${NPROC:-}" ] ||
      echo "# assumed: no GPUs; a job adds --nproc with those of its node, and so does NPROC=8 here"
    show cd "$PWD"
    show "${command[@]}"
    exit 0
  fi
  exec "${command[@]}"
}
