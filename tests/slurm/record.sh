#!/usr/bin/env bash
# Record what sacct and squeue say of every fate a job can have, for tests/test_slurm_state.py.
#
#   . /tmp/membench-slurm/env.sh && tests/slurm/record.sh recorded [oom]
#
# The cluster must be a fresh one, since everything it knows is recorded.
# `oom` records only the job out of memory: it takes a cluster started with MEMBENCH_SLURM_CGROUP=1.
# Jobs are named for what happens to them; as membench's own, each starts its work by srun.
set -euo pipefail
out=$(realpath "$1")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
. "$(dirname "${BASH_SOURCE[0]}")/formats.sh"

# submit NAME COMMAND [SBATCH OPTION...]: a job whose one step runs COMMAND; prints the job's id.
submit() {
    local name=$1 command=$2
    shift 2
    sbatch --parsable --job-name="$name" --output="$scratch/%j.log" --open-mode=append --mem=100 "$@" \
        --wrap "srun bash -c '$command'"
}

snapshot() {
    sacct -D -P --format="$SACCT_FORMAT" > "$out/$1.sacct"
    squeue -h -r -t all -O "$SQUEUE_FORMAT" > "$out/$1.squeue"
    echo "$1: $(wc -l < "$out/$1.sacct") lines of sacct, $(wc -l < "$out/$1.squeue") of squeue"
}

until_state() { # JOB STATE
    for _ in $(seq 1 600); do
        [[ $(squeue -h -t all -j "$1" -o %T) == "$2" ]] && return
        sleep 0.2
    done
    echo "job $1 never came to $2" >&2
    exit 1
}

if [[ ${2:-} == oom ]]; then
    id=$(submit out_of_memory 'python3 -c "b = bytearray(10**9); b[::4096] = bytes(len(b[::4096]))"')
    until [[ $(squeue -h -t all -j "$id" -o %T) =~ FAILED|OUT_OF_MEMORY ]]; do sleep 0.2; done
    sleep 3
    snapshot oom
    exit
fi

# -- alive ---------------------------------------------------------------------------------------
limit=$(submit time_limit 'trap "" TERM; sleep 200' --time=1 --nodelist=n1)
scontrol update nodename=n3 state=drain reason=testing
running=$(submit running 'sleep 60' --nodelist=n1)
submit array_limit 'sleep 60' --nodelist=n1 --array=0-3%1 > /dev/null
submit dependency true --dependency="afterany:$running" > /dev/null
failing=$(submit error 'exit 1')
submit never_satisfied true --dependency="afterok:$failing" > /dev/null
submit held true --hold > /dev/null
submit drained_node true --nodelist=n3 > /dev/null
submit partition_limit true --time=61 > /dev/null
submit resources true --nodelist=n1 --gpus-per-node=2 --exclusive > /dev/null
cancelled=$(submit cancelled 'sleep 60' --nodelist=n2)
pending=$(submit cancelled_pending true --hold)
killed=$(submit killed 'kill -9 $$' --nodelist=n2)
submit signalled 'kill -USR2 $$' --nodelist=n2 > /dev/null
submit done true --nodelist=n2 > /dev/null
submit done_array true --nodelist=n2 --array=0-2 > /dev/null
submit launch_failed true --nodelist=n2 --chdir=/ --output=/nonexistent/log > /dev/null
until_state "$cancelled" RUNNING
scancel "$cancelled" "$pending"
until_state "$killed" FAILED
until_state "$cancelled" CANCELLED
until_state "$failing" FAILED
sleep 6
snapshot alive

# -- requeued ------------------------------------------------------------------------------------
scancel --name=array_limit --name=held
scontrol update nodename=n3 state=resume || true # it may have come back by itself
scancel --state=PENDING --user="$(id -un)"
sleep 2
preempted=$(submit preempted 'trap "" TERM; sleep 40' --nodelist=n2 --exclusive --requeue)
node_fail=$(submit node_fail 'sleep 40' --nodelist=n3 --requeue)
lost=$(submit node_fail_lost 'sleep 40' --nodelist=n3 --no-requeue)
asked=$(submit requeued 'sleep 40' --nodelist=n1 --requeue)
for id in "$preempted" "$node_fail" "$lost" "$asked"; do until_state "$id" RUNNING; done
high=$(submit high 'sleep 12' --partition=high --nodelist=n2 --exclusive)
scontrol requeue "$asked"
scontrol update nodename=n3 state=down reason=testing
until_state "$high" RUNNING
until_state "$lost" NODE_FAIL
sleep 3
snapshot requeued

# -- over ----------------------------------------------------------------------------------------
scontrol update nodename=n3 state=resume || true # it may have come back by itself
for id in "$preempted" "$node_fail" "$asked"; do until_state "$id" COMPLETED; done
until_state "$limit" TIMEOUT
sleep 3
snapshot over
