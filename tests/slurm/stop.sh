#!/usr/bin/env bash
# End what start.sh started in DIRECTORY: stop.sh DIRECTORY
set -euo pipefail
dir=$(cd "$1" && pwd)
for file in "$dir"/n?/slurmd.pid "$dir/slurmctld.pid" "$dir/munged.pid"; do
    if [[ -s $file ]]; then
        kill "$(cat "$file")" 2>/dev/null || true
    fi
done
