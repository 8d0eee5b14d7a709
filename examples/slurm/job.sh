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

# fail MESSAGE ...: end the job before it starts anything.
fail() {
    echo "error: $*" >&2
    exit 1
}

# Seconds for the ranks to stop after the warning; less than those of --signal, as far as a job can
# see them: in sbatch's environment variable or in its script, not sbatch's own --signal option.
GRACE=${GRACE:-240}
signal=${SBATCH_SIGNAL:-$(grep -m 1 -oP '^#SBATCH --signal=\K\S+' "$0" 2>/dev/null || true)}
[[ $signal == *@* ]] && lead=${signal##*@} || lead=${signal:+60} # SLURM's default
[[ $GRACE =~ ^[1-9][0-9]*$ ]] ||
    fail "GRACE=$GRACE is not a number of seconds: set it to one such as GRACE=240"
[[ ! $lead =~ ^[0-9]+$ ]] || ((GRACE < 10#$lead)) ||
    fail "GRACE=$GRACE is not less than the $lead seconds before the time limit at which" \
        "--signal=$signal warns: lower it, or set SBATCH_SIGNAL=B:USR1@$((GRACE + 60)) for sbatch"

# What a job sets itself: key => what to change instead. Each script adds its own.
declare -A OWN=(
    [trainer.devices]="give sbatch --ntasks-per-node and --gpus-per-node"
    [trainer.num_nodes]="give sbatch --nodes"
)

# key_of ARGUMENT: the key that it sets or deletes, without Hydra's +, ~ and @package.
key_of() {
    local key=${1%%=*}
    key=${key#"${key%%[!+~ ]*}"}
    key=${key%%@*}
    echo "${key%"${key##*[! ]}"}"
}

# refuse_own ARGUMENT ...: end the job for an argument that sets a key of OWN, in any spelling, or a
# block with one: it would win over the job's variables, or lose, without a word.
refuse_own() {
    local argument key own
    for argument in "$@"; do
        key=$(key_of "$argument")
        [[ $key != -* ]] || continue # an option of Hydra
        for own in "${!OWN[@]}"; do
            [[ $key != "$own" && $key != "$own".* ]] ||
                fail "$argument: this job sets $own itself: leave it out, and ${OWN[$own]}"
            [[ $own != "$key".* ]] ||
                fail "$argument would replace $own, which this job sets itself: give the other" \
                    "keys of $key one by one; for $own, ${OWN[$own]}"
        done
    done
}

# run PRODUCT SCRIPT [key=value ...]: run SCRIPT on all tasks, which writes PRODUCT when complete.
run() {
    local product=$1 task status=0 before after contents
    local -a command
    launcher
    command+=("${@:2}" trainer.devices="$SLURM_NTASKS_PER_NODE" trainer.num_nodes="$SLURM_NNODES")
    echo "job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date): ${command[*]}"
    before=$(version "$product") contents=$(written "$product")
    stop_by='' warned='' said=$(mktemp)
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
        # A run that has stopped early also exits with 0, and an earlier one of fewer steps may have
        # left a product: one that this run did not write counts only if the run says so.
        [[ $status == 0 && -n $after ]] && { [[ $after != "$before" ]] || was_complete; } && return 0
        if [[ -z $stop_by ]] || ! was_stopped "$status"; then
            explain "$status" "$product"
            return $((status ? status : 1))
        fi
    fi
    if ((warned < GRACE)) && [[ $(written "$product") == "$contents" ]]; then
        echo "error: not requeued: the warning of the time limit came $warned seconds after the" \
            "start, before anything was written, and would again. Give sbatch a --time that is" \
            "longer than the seconds of --signal${signal:+ ($signal)} and the loading of the" \
            "model together"
        return 1
    fi
    echo "not finished at the time limit: requeued"
    scontrol requeue "$job"
}

# version FILE: its inode and modification time; empty if there is none. They are only compared for
# equality, because the clocks of nodes and file servers differ.
version() {
    [[ ! -e $1 ]] || stat --format='%i %y' "$1"
}

# written FILE: the names beside it: shards of a store, checkpoints of a run.
written() {
    ls -A "$(dirname "$1")" 2>/dev/null || true
}

# was_complete: whether the ranks said that an earlier run had left nothing to do.
was_complete() {
    grep -qE '(^|: )nothing to train: |: the store is complete; nothing is dumped' "$said"
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
    local what="is missing"
    [[ ! -e $2 ]] || what="is that of an earlier run"
    echo "error: the ranks exited with status 0, but $2, which a complete run writes, $what." \
        "If the run stopped early (exp_manager.max_time_per_run), submit the same command to" \
        "resume. If arguments change what is written or where, leave them out: the job's" \
        "environment variables set the paths"
}

# Send SIGTERM to the ranks, not to this script: a dump completes its shard, a training its step.
stop() {
    local grace=$GRACE left
    left=$(time_left)
    if [[ -n $left ]] && ((left <= GRACE)); then
        grace=$((left > 20 ? left - 10 : left / 2))
        echo "warning: --signal warned $left seconds before the time limit, which is less than" \
            "GRACE=$GRACE: the ranks get $grace. Give --signal more seconds than GRACE"
    fi
    warned=$SECONDS stop_by=$((SECONDS + grace))
    echo "time limit near, $(date): the ranks are asked to stop"
    scancel --signal=TERM "$job"
}

# time_left: the seconds to the job's time limit; empty if SLURM does not say.
time_left() {
    local end
    end=$(scontrol --oneliner show job "$job" 2>/dev/null | grep -m 1 -oP ' EndTime=\K\S+') &&
        end=$(date --date="$end" +%s 2>/dev/null) && echo $((end - $(date +%s))) || true
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
