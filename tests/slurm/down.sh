#!/usr/bin/env bash
# Stop what up.sh started, found by its pid files and nothing else. --purge also deletes the folder.
set -u

dir=${MEMBENCH_SLURM_DIR:-/tmp/membench-slurm}
export SLURM_CONF=$dir/etc/slurm.conf

# The pid in file $1, if it is a live process of program $2.
running() {
    local pid
    pid=$(cat "$1" 2> /dev/null) && [[ -n $pid ]] && grep -aqs "$2" "/proc/$pid/cmdline" && echo "$pid"
}

stop() {
    local pid
    pid=$(running "$1" "$2") || { rm -f "$1"; return; }
    kill -TERM "$pid"
    for _ in $(seq 1 200); do
        [[ -e /proc/$pid ]] || break
        sleep 0.1
    done
    if [[ -e /proc/$pid ]]; then
        echo "$2 $pid did not end on TERM: killed" >&2
        kill -KILL "$pid"
    fi
    rm -f "$1"
}

# Each live job step listens on a socket below the spool folder.
steps() { grep -c " $dir/spool/" /proc/net/unix; }

if running "$dir/run/slurmctld.pid" slurmctld > /dev/null; then
    timeout 10 scancel -u root 2> /dev/null
    for _ in $(seq 1 60); do
        [[ $(steps) == 0 ]] && break
        sleep 0.25
    done
fi
for file in "$dir"/run/slurmd.*.pid; do # all at once: each takes seconds
    if pid=$(running "$file" slurmd); then kill -TERM "$pid"; fi
done
for file in "$dir"/run/slurmd.*.pid; do stop "$file" slurmd; done
stop "$dir/run/slurmctld.pid" slurmctld
stop "$dir/run/slurmdbd.pid" slurmdbd
stop "$dir/run/mariadbd.pid" mariadbd
stop "$dir/run/munged.pid" munged

left=$(steps)
if [[ $left != 0 ]]; then
    echo "$left job steps are left behind:" >&2
    grep " $dir/spool/" /proc/net/unix >&2
fi
for node in "$dir"/spool/*; do
    find /sys/fs/cgroup/*/"slurm_${node##*/}" -depth -type d -exec rmdir {} + 2> /dev/null
done
[[ ${1:-} == --purge ]] && rm -rf "$dir"
[[ $left == 0 ]]
