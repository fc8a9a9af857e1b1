#!/usr/bin/env bash
# A throw-away SLURM cluster of one node, this machine, of Debian's packages slurm-wlm and munge, without systemd,
# cgroups or a database:
#
#     eval "$(tests/slurm/cluster.sh start)"    # sets SLURM_CONF, by which srun, sbatch and squeue find it
#     tests/slurm/cluster.sh stop               # kills its jobs too
#
# Keys, state and logs are in one folder, $SLURM_CLUSTER (by default slurm-cluster in the temporary folder). It has two
# CPUs and two partitions over them: a job in `high` takes them from one in `low`, which gets SIGTERM, 20 seconds to end,
# and is queued again.
set -euo pipefail

folder=${SLURM_CLUSTER:-${TMPDIR:-/tmp}/slurm-cluster}
export SLURM_CONF=$folder/slurm.conf
PATH=$PATH:/usr/sbin # of munged, slurmctld and slurmd
daemons=(munged slurmctld slurmd)

running() { # NAME: whether the cluster's daemon of this name lives
    [[ -s $folder/$1.pid ]] && [[ /proc/$(<"$folder/$1.pid")/exe -ef $(command -v "$1") ]]
}

all_run() { for name in "${daemons[@]}"; do running "$name" || return; done; }

configure() {
    local memory
    memory=$(slurmd -C | grep -o 'RealMemory=[0-9]*')
    mkdir -p "$folder"/{state,spool,log}
    chmod 755 "$folder"
    (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
    cat >"$SLURM_CONF" <<END
ClusterName=throwaway
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=26817
SlurmdPort=26818
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.log
AuthType=auth/munge
# a job queued again waits for its credential to end, 120 s by default
AuthInfo=socket=$folder/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=5,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=localhost NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 CPUs=2 $memory
PartitionName=low Nodes=localhost Default=YES PriorityTier=1 GraceTime=20
PartitionName=high Nodes=localhost PriorityTier=2
END
}

start() {
    all_run || {
        stop
        configure
        munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
            --log-file="$folder/log/munged.log" --seed-file="$folder/munge.seed" 2>>"$folder/log/munged.log"
        slurmctld
        slurmd
    }
    for _ in {1..100}; do
        [[ $(sinfo -h -o %t -p low 2>/dev/null) =~ ^(idle|mix|alloc)$ ]] && {
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        }
        sleep 0.2
    done
    echo "error: the node did not come up; logs: $folder/log" >&2
    exit 1
}

stop() {
    if all_run; then
        scancel --user="$(id -un)"
        for _ in {1..150}; do [[ -z $(squeue -h) ]] && break; sleep 0.2; done
    fi
    for name in slurmd slurmctld munged; do
        running "$name" || continue
        local pid
        pid=$(<"$folder/$name.pid")
        kill "$pid"
        for _ in {1..100}; do [[ -d /proc/$pid ]] || break; sleep 0.1; done
    done
    rm -rf "$folder"/{state,spool,log,slurm.conf,munge.*,*.pid}
    [[ ! -d $folder ]] || rmdir "$folder"
}

case ${1-} in
start | stop) "$1" ;;
*) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2 ;;
esac
