#!/usr/bin/env bash
# A SLURM cluster of two nodes on this machine, for test_slurm.py: start.sh DIRECTORY
#
# Debian's slurm-wlm and munge, with sockets, state, ports and daemons of their own: a SLURM that
# is installed here for real work is not touched. Prints the path of slurm.conf; stop.sh ends it.
set -euo pipefail
mkdir -p "$1"
dir=$(cd "$1" && pwd)
port=${SLURM_TEST_PORT:-17000}
host=$(hostname -s)

export PATH=$PATH:/usr/sbin
if ! command -v slurmctld slurmd munged >/dev/null; then
    if ! { apt-get update && apt-get install -y --no-install-recommends slurm-wlm munge; } >"$dir/apt.log" 2>&1; then
        echo "SLURM is not installed and apt-get install slurm-wlm munge fails: $(tail -n 1 "$dir/apt.log")" >&2
        exit 77
    fi
fi

mkdir -p "$dir"/{state,n0,n1}
head -c 128 /dev/urandom >"$dir/munge.key"
chmod 600 "$dir/munge.key"
munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munged.log" --seed-file="$dir/munged.seed" 2>/dev/null

# cred_expire: a requeued job waits as long as a credential lives, by default two minutes.
cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthInfo=socket=$dir/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdPidFile=$dir/%n/slurmd.pid
SlurmdLogFile=$dir/%n/slurmd.log
SlurmdParameters=config_overrides
SlurmdSpoolDir=$dir/%n/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=5
SchedulerParameters=bf_interval=5
NodeName=n0 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=2
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=2
PartitionName=test Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
CONF

slurmctld -f "$dir/slurm.conf"
slurmd -N n0 -f "$dir/slurm.conf"
slurmd -N n1 -f "$dir/slurm.conf"
for _ in $(seq 30); do
    if SLURM_CONF=$dir/slurm.conf sinfo --noheader --format=%D --states=idle 2>/dev/null | grep -q 2; then
        echo "$dir/slurm.conf"
        exit 0
    fi
    sleep 1
done
echo "the nodes did not come up; see $dir/*.log" >&2
exit 1
