#!/usr/bin/env bash
# Submit a dump, and a training that starts when it has succeeded. From the root of the checkout:
#   TEACHER=/lustre/teacher.nemo STUDENT=/lustre/student.nemo DATA=/lustre/train.jsonl \
#       STORE=/lustre/store RUN=/lustre/runs/kd examples/slurm/submit.sh +model.kd.alpha=0.9
# Arguments are passed to the training. Variables split at spaces and newlines: DUMP_ARGUMENTS for
# the dump, SBATCH_OPTIONS for both jobs (--nodes=4 --time=08:00:00).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=examples/slurm/settings.sh
source examples/slurm/settings.sh
for name in TEACHER DATA STORE STUDENT RUN; do
    [[ -n ${!name:-} ]] || { echo "error: set $name; see $0" >&2 && exit 1; }
done
export TEACHER DATA STORE STUDENT RUN

# All lines of a variable, split at white space. Bash before 4.4 takes an empty array for unset.
IFS=$' \t\n' read -r -d '' -a dump_arguments <<<"${DUMP_ARGUMENTS:-}" || true
IFS=$' \t\n' read -r -d '' -a options <<<"${SBATCH_OPTIONS:-}" || true
for option in ${options[@]+"${options[@]}"}; do
    [[ $option != --signal=* ]] || export SBATCH_SIGNAL=${option#*=} # job.sh compares GRACE with it
done

id=$(sbatch --parsable ${options[@]+"${options[@]}"} examples/slurm/dump_teacher.sbatch \
    ${dump_arguments[@]+"${dump_arguments[@]}"})
dump=${id%%;*} cluster=${id#"${id%%;*}"} # of several clusters: 123;cluster
clusters=${cluster:+ --clusters=${cluster#;}}
depends=(--dependency="afterok:$dump" --kill-on-invalid-dep=yes)
if ! train=$(sbatch --parsable ${options[@]+"${options[@]}"} "${depends[@]}" \
    examples/slurm/train_kd.sbatch "$@"); then
    again=$(printf ' %q' ${options[@]+"${options[@]}"} "${depends[@]}" examples/slurm/train_kd.sbatch "$@")
    echo "error: dump $dump is submitted, the training is not: scancel$clusters $dump, or correct" \
        "what sbatch names above and run, with the same variables: sbatch$again" >&2
    exit 1
fi
echo "dump $dump, then train ${train%%;*}; squeue$clusters --jobs=$dump,${train%%;*}"
