#!/usr/bin/env bash
# A throw-away Slurm cluster on this one machine: NODES nodes with fake GPUs, accounting, loopback only.
#
#   sudo tests/slurm/up.sh          # twice is harmless: what runs is left alone, what died is started
#   . /tmp/membench-slurm/env.sh    # SLURM_CONF for this shell
#   sudo tests/slurm/down.sh        # stops it; --purge also deletes the folder
#
# Needs root and Debian's packages (installed if missing); no systemd. Everything else lies below
# $MEMBENCH_SLURM_DIR. Exit 3: no cluster can be had here (not root, not Debian, packages missing).
set -euo pipefail

dir=${MEMBENCH_SLURM_DIR:-/tmp/membench-slurm}
nodes=${MEMBENCH_SLURM_NODES:-3}
cpus=${MEMBENCH_SLURM_CPUS:-4}           # a node; may be more than the machine has
gpus=${MEMBENCH_SLURM_GPUS:-2}           # a node; fake
memory=${MEMBENCH_SLURM_MEMORY:-4000}    # MB a node; may be fake
port=${MEMBENCH_SLURM_PORT:-26817}       # slurmctld; slurmdbd +1; slurmd of node i +10+i
max_array=${MEMBENCH_SLURM_MAX_ARRAY:-8} # small, so that the tests' sweeps exceed it
grace=${MEMBENCH_SLURM_GRACE:-10}        # seconds between a preempted job's signal and its end
cgroup=${MEMBENCH_SLURM_CGROUP:-0}       # 1: cgroup v1 holds jobs to their memory; a kill is then real
host=$(hostname -s)

unavailable() {
    echo "no Slurm cluster here: $1" >&2
    exit 3
}

install_packages() {
    local package missing=()
    for package in munge slurmctld slurmd slurmdbd slurm-client mariadb-server-core mariadb-client-core; do
        dpkg-query -W -f='${Status}' "$package" 2> /dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    [[ ${#missing[@]} -gt 0 ]] || return 0
    local policy=/usr/sbin/policy-rc.d # while it exists, packages start no daemons of their own
    if [[ ! -e $policy ]]; then
        trap "rm -f $policy" EXIT
        printf '#!/bin/sh\nexit 101\n' > $policy
        chmod +x $policy
    fi
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -q && apt-get install -y -q --no-install-recommends "${missing[@]}"; } \
        > "$dir/log/apt.log" 2>&1 || unavailable "apt-get could not install ${missing[*]}, see $dir/log/apt.log"
}

write_configuration() {
    local index lines='' constrain=''
    [[ -s $dir/etc/munge.key ]] || (umask 077 && head -c 1024 /dev/urandom > "$dir/etc/munge.key")
    # Slurm wants character devices whose names end in the index.
    for index in $(seq 0 $((gpus - 1))); do ln -sfn /dev/null "$dir/dev/gpu$index"; done
    printf 'AutoDetect=off\nName=gpu Type=fake File=%s\n' "$dir/dev/gpu[0-$((gpus - 1))]" > "$dir/etc/gres.conf"
    for index in $(seq 1 "$nodes"); do
        mkdir -p "$dir/spool/n$index"
        lines+="NodeName=n$index NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 10 + index))"
        lines+=" CPUs=$cpus SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1"
        lines+=" RealMemory=$memory Gres=gpu:fake:$gpus State=UNKNOWN"$'\n'
    done
    if [[ $cgroup == 1 ]]; then
        constrain=$'ProctrackType=proctrack/cgroup\nTaskPlugin=task/cgroup'
        printf '%s\n' CgroupPlugin=cgroup/v1 CgroupMountpoint=/sys/fs/cgroup ConstrainRAMSpace=yes \
            ConstrainSwapSpace=no > "$dir/etc/cgroup.conf"
    else
        constrain=$'ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none'
    fi
    cat > "$dir/etc/slurm.conf" << END
ClusterName=membench
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits (default 120 s). It must exceed KillWait: else a
# restarted job can meet its own dying step, "Duplicate jobid", and Slurm drains the node.
AuthInfo=socket=$dir/run/munge.socket,cred_expire=6
KillWait=2
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
$constrain
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=${MEMBENCH_SLURM_NODE_TIMEOUT:-10}
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=5,sched_min_interval=0
PriorityType=priority/basic
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
CompleteWait=0
MinJobAge=3600
MaxArraySize=$max_array
MaxJobCount=10000
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((port + 1))
# Clients of slurmdbd take their munge socket from here, not from AuthInfo.
AccountingStoragePass=$dir/run/munge.socket
AccountingStorageTRES=gres/gpu
${lines}PartitionName=main Nodes=ALL Default=YES MaxTime=60 DefaultTime=5 PriorityTier=1 PreemptMode=REQUEUE GraceTime=$grace State=UP
PartitionName=high Nodes=ALL MaxTime=60 DefaultTime=5 PriorityTier=10 PreemptMode=OFF State=UP
END
    (umask 077 && cat > "$dir/etc/slurmdbd.conf") << END
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.socket
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$((port + 1))
SlurmUser=root
CommunicationParameters=NoInAddrAny
LogFile=$dir/log/slurmdbd.log
PidFile=$dir/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
END
    printf 'export MEMBENCH_SLURM_DIR=%q SLURM_CONF=%q\n' "$dir" "$dir/etc/slurm.conf" > "$dir/env.sh"
}

# Whether the pid file $1 names a live process of program $2.
alive() {
    local pid
    pid=$(cat "$dir/run/$1.pid" 2> /dev/null) && [[ -n $pid ]] && grep -aqs "$2" "/proc/$pid/cmdline"
}

# Repeat a command for $1 seconds, until it succeeds.
wait_for() {
    local end=$((SECONDS + $1))
    shift
    until timeout 10 "$@" > "$dir/log/wait.log" 2>&1; do
        if [[ $SECONDS -ge $end ]]; then
            echo "timed out: $*" >&2
            tail -n 5 "$dir/log/wait.log" >&2
            return 1
        fi
        sleep 0.1
    done
}

start_munge() {
    alive munged munged || munged --key-file="$dir/etc/munge.key" --socket="$dir/run/munge.socket" \
        --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/state/munged.seed"
    wait_for 10 sh -c "munge -n -S '$dir/run/munge.socket' | unmunge -S '$dir/run/munge.socket'"
}

start_accounting() {
    if ! alive mariadbd mariadbd; then
        [[ -d $dir/db/mysql ]] || mariadb-install-db --no-defaults --user=root --datadir="$dir/db" \
            --auth-root-authentication-method=socket --skip-test-db > "$dir/log/mariadb-install.log" 2>&1
        setsid mariadbd --no-defaults --user=root --datadir="$dir/db" --socket="$dir/run/mariadb.sock" \
            --pid-file="$dir/run/mariadbd.pid" --skip-networking --innodb-buffer-pool-size=64M \
            --innodb-log-file-size=16M --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 \
            --log-error="$dir/log/mariadbd.log" < /dev/null > /dev/null 2>&1 &
        wait_for 60 mariadb --no-defaults -S "$dir/run/mariadb.sock" -e 'create database if not exists slurm_acct_db'
    fi
    # The only way to tell slurmdbd where MariaDB's socket is.
    alive slurmdbd slurmdbd || MYSQL_UNIX_PORT="$dir/run/mariadb.sock" slurmdbd
    wait_for 60 sacctmgr -n show cluster
}

start_slurm() {
    local index
    alive slurmctld slurmctld || slurmctld
    wait_for 20 scontrol ping
    for index in $(seq 1 "$nodes"); do alive "slurmd.n$index" slurmd || slurmd -N "n$index"; done
    wait_for 60 sh -c "[ \$(sinfo -h -N -p main -t idle,mix,alloc -o %N | sort -u | wc -l) = $nodes ]"
}

[[ $(id -u) == 0 ]] || unavailable 'it takes root'
command -v apt-get > /dev/null || unavailable 'it takes Debian (apt-get)'
umask 022
mkdir -p "$dir"/{etc,run,log,state,dev,db}
install_packages
write_configuration
export SLURM_CONF=$dir/etc/slurm.conf
start_munge
start_accounting
start_slurm
sinfo -N -p main -o '%N %t %c %m %G'
