# shellcheck shell=bash
# Sourced by the .sbatch files: runs one srun that stops cleanly before the time limit, is requeued
# and resumes, until its output exists.

# shellcheck source=examples/slurm/settings.sh
source examples/slurm/settings.sh

# place NAME ASKED ACTUAL: report a job that sbatch was not given the account or partition of.
place() {
    [[ -z $2 || -z $3 || ,${2,,}, == *",${3,,},"* ]] ||
        echo "warning: this job runs in the $1 $3, but settings.sh names $2. sbatch does not read" \
            "settings.sh: run 'source examples/slurm/settings.sh' before sbatch, or give sbatch --$1"
}
place account "$SBATCH_ACCOUNT" "${SLURM_JOB_ACCOUNT:-}"
place partition "$SBATCH_PARTITION" "${SLURM_JOB_PARTITION:-}"

# SLURM_JOB_ID of one task of an array is the array's own id, which means all of its tasks.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# Rendezvous: the job's first node, and a port that differs between jobs.
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 40000))
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron requires it with tensor parallelism

# Seconds for the ranks to stop after the warning; less than those of --signal.
GRACE=${GRACE:-240}

# run PRODUCT SCRIPT [key=value ...]: run SCRIPT on all tasks, which writes PRODUCT when complete.
run() {
    local product=$1 task status=0 before after
    local -a command
    launcher
    command+=("${@:2}" trainer.devices="$SLURM_NTASKS_PER_NODE" trainer.num_nodes="$SLURM_NNODES")
    echo "job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date): ${command[*]}"
    before=$(version "$product")
    stop_by='' said=$(mktemp)
    trap stop USR1
    trap 'rm -f "$said"' EXIT
    { "${command[@]}" 2>&1 >&3 | tee "$said" >&2; } 3>&1 &
    task=$!
    while kill -0 "$task" 2>/dev/null && [[ -z $stop_by || $SECONDS -lt $stop_by ]]; do
        sleep 1
    done
    if ! kill -0 "$task" 2>/dev/null; then
        wait "$task" || status=$?
        after=$(version "$product")
        # A run that was stopped also exits with 0: only a product that it wrote itself shows that
        # it is complete. An earlier run of fewer steps may have left one.
        [[ $status == 0 && -n $after && (-z $stop_by || $after != "$before") ]] && return 0
        if [[ -z $stop_by ]] || ! was_stopped "$status"; then
            explain "$status" "$product"
            return $((status ? status : 1))
        fi
    fi
    echo "not finished at the time limit: requeued"
    scontrol requeue "$job"
}

# version FILE: its inode and modification time; empty if there is none. They are only compared for
# equality, because the clocks of nodes and file servers differ.
version() {
    [[ ! -e $1 ]] || stat --format='%i %y' "$1"
}

# was_stopped STATUS: whether the ranks ended because of SIGTERM, cleanly or while they still loaded.
# srun's status does not tell: when a rank fails, it terminates the others and may exit with 143.
was_stopped() {
    [[ $1 == 0 || $1 == 143 ]] &&
        ! grep -qP '^srun: error: [^ ]+: tasks? [^:]+: (?!Terminated$|Killed$)' "$said"
}

# explain STATUS PRODUCT: say why this job has failed.
explain() {
    if [[ $1 != 0 ]]; then
        echo "error: failed with status $1${stop_by:+ after the warning of the time limit}:" \
            "not requeued. Correct what the messages above name and submit the same command again"
        return
    fi
    echo "error: the ranks exited with status 0, but $2, which a complete run writes, is missing." \
        "If the run stopped early (exp_manager.max_time_per_run), submit the same command to" \
        "resume. If arguments change what is written or where (output_dir, exp_manager), leave" \
        "them out: the job's environment variables set the paths"
}

# Send SIGTERM to the ranks, not to this script: a dump completes its shard, a training its step.
stop() {
    stop_by=$((SECONDS + GRACE))
    echo "time limit near, $(date): the ranks are asked to stop"
    scancel --signal=TERM "$job"
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
