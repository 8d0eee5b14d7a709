# shellcheck shell=bash
# Sourced by the .sbatch files: runs one srun that stops cleanly before the time limit, is requeued
# and resumes, until its output exists.

# shellcheck source=examples/slurm/settings.sh
source examples/slurm/settings.sh

# Rendezvous: the job's first node, and a port that differs between jobs.
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 40000))
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron requires it with tensor parallelism

# Seconds for the ranks to stop after the warning; less than those of --signal.
GRACE=${GRACE:-240}

# run PRODUCT SCRIPT [key=value ...]: run SCRIPT on all tasks, which writes PRODUCT when complete.
run() {
    local product=$1 task status=0 before
    local -a command
    launcher
    command+=("${@:2}" trainer.devices="$SLURM_NTASKS_PER_NODE" trainer.num_nodes="$SLURM_NNODES")
    echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date): ${command[*]}"
    before=$(version "$product")
    stop_by=
    trap stop USR1
    "${command[@]}" &
    task=$!
    while kill -0 "$task" 2>/dev/null && [[ -z $stop_by || $SECONDS -lt $stop_by ]]; do
        sleep 1
    done
    if ! kill -0 "$task" 2>/dev/null; then
        wait "$task" || status=$?
        # A run that was stopped also exits with 0: only a product that it wrote itself shows that
        # it is complete. An earlier run of fewer steps may have left one.
        [[ $status == 0 && -e $product && (-z $stop_by || $(version "$product") != "$before") ]] &&
            return 0
        [[ -z $stop_by ]] && return $((status ? status : 1))
    fi
    echo "not finished at the time limit: requeued"
    scontrol requeue "$SLURM_JOB_ID"
}

# version FILE: its inode and modification time; empty if there is none. They are only compared for
# equality, because the clocks of nodes and file servers differ.
version() {
    [[ ! -e $1 ]] || stat --format='%i %y' "$1"
}

# Send SIGTERM to the ranks, not to this script: a dump completes its shard, a training its step.
stop() {
    stop_by=$((SECONDS + GRACE))
    echo "time limit near, $(date): the ranks are asked to stop"
    scancel --signal=TERM "$SLURM_JOB_ID"
}

# Set `command` to srun, in the container if there is one. PYTHONPATH is extended inside it, which
# keeps the image's own; nemo_kd need not be installed there.
launcher() {
    command=(srun --kill-on-bad-exit=1)
    local python=${PYTHON:-$PWD/.venv/bin/python}
    if [[ -n $IMAGE ]]; then
        python=${PYTHON:-python}
        command+=(--container-image="$IMAGE" --container-workdir="$PWD")
        command+=(--container-mounts="$PWD${MOUNTS:+,$MOUNTS}")
    fi
    # shellcheck disable=SC2016 # expanded by the inner shell
    command+=(bash -c 'PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} exec "$@"' rank "$python")
}
