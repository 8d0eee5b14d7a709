#!/usr/bin/env bash
# Submit a dump, and a training that starts when it has succeeded. From the root of the checkout:
#   TEACHER=/lustre/teacher.nemo STUDENT=/lustre/student.nemo DATA=/lustre/train.jsonl \
#       STORE=/lustre/store RUN=/lustre/runs/kd examples/slurm/submit.sh +model.kd.alpha=0.9
# Arguments are passed to the training. Space-separated variables: DUMP_ARGUMENTS for the dump,
# SBATCH_OPTIONS for both jobs (--nodes=4 --time=08:00:00).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=examples/slurm/settings.sh
source examples/slurm/settings.sh
for name in TEACHER DATA STORE STUDENT RUN; do
    [[ -n ${!name:-} ]] || { echo "error: set $name; see $0" >&2 && exit 1; }
done
export TEACHER DATA STORE STUDENT RUN

read -ra dump_arguments <<<"${DUMP_ARGUMENTS:-}"
read -ra options <<<"${SBATCH_OPTIONS:-}"
dump=$(sbatch --parsable "${options[@]}" examples/slurm/dump_teacher.sbatch "${dump_arguments[@]}")
train=$(sbatch --parsable "${options[@]}" --dependency="afterok:$dump" --kill-on-invalid-dep=yes \
    examples/slurm/train_kd.sbatch "$@")
echo "dump $dump, then train $train; squeue --jobs=$dump,$train"
