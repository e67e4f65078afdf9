#!/usr/bin/env bash
#SBATCH --job-name=wemmu-data
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=04:00:00
#SBATCH --output=wemmu-data-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#
# Writes the data set of a curriculum on the nodes of one Slurm job, as `wemmu data write` does on one
# machine. From the root of the repository:
#
#   sbatch slurm/data.sh configs/shapes/curriculum.yaml
#   sbatch --nodes=8 --cpus-per-task=32 slurm/data.sh CURRICULUM.yaml --set data.shards=/shared/shards
#
# What follows the curriculum goes to the writer. PYTHON names another Python than .venv/bin/python. data.shards must be
# a directory that every node sees. What is finished stays: a job that was cut short goes on where it was when it is
# submitted again; after a pre-emption and at its time limit it queues itself again. In a chain of the launcher it ends as
# the other jobs do: crashes, as of Ray's head, are tried three times, and the ledger tells each end.
#
# The first node runs the head of a Ray cluster and the writer, every node runs workers. The cluster is the job's own:
# a random token, known from the environment alone, keeps other users out; nothing leaves the nodes.
set -euo pipefail

PYTHON=${PYTHON:-.venv/bin/python}
# Ports from here on, below those that Linux hands out by itself (32768 and above).
PORTS_FROM=20000
PORTS=10000

# Told to end, a node shall not wait for its work.
export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0

fail() {
    printf 'slurm/data.sh: %s\n' "$*" >&2
    exit 1
}

# Tell the ledger of the run folder, where the launcher submitted this. $@: started, or ended and the exit code.
note() {
    [[ -z ${RUN-} ]] || "$PYTHON" -m launcher note data "$@"
}

# The address by which the other nodes reach this one.
node_address() {
    local name address
    name=$(scontrol show node "$SLURMD_NODENAME" | sed -nE 's/.*NodeAddr=([^ ]+).*/\1/p')
    address=$(getent ahostsv4 "$name" | awk '{ print $1; exit }')
    case $name/$address in
    # All nodes are this machine. Ray takes 127.0.0.1 for "whatever address leads out of here", but no other name of it.
    127.*) echo 127.0.0.2 ;;
    # A machine that knows itself as loopback (Debian's /etc/hosts does that): the others do not.
    */127.*) hostname -I | awk '{ print $1 }' ;;
    *) echo "$address" ;;
    esac
}

# End what Ray leaves behind: a worker that it was just starting does not see that its node is gone. Where Slurm knows
# the processes of a job by control groups it would do that, by their parents it does not find them.
# $1: the scratch directory of the node, which all its processes have in their environment.
# shellcheck disable=SC2317,SC2329 # called by the steps
end_ray_node() {
    local environments
    while mapfile -t environments < <(grep -lszxF "WEMMU_RAY=$1" /proc/[0-9]*/environ) && ((${#environments[@]})); do
        printf '%s\n' "${environments[@]}" | tr -dc '0-9\n' | xargs kill -KILL 2>/dev/null || true
        sleep 0.1
    done
    rm -rf "$1"
}

# One node of the Ray cluster, until it is told to end. $@: what `ray start` is told beside that.
# shellcheck disable=SC2317,SC2329 # called by the steps
ray_node() {
    local scratch parent=${TMPDIR:-/tmp} ray tenth
    # Ray puts sockets there, whose paths may not be longer than 107 characters; 64 of them are its own.
    ((${#parent} <= 20)) || parent=/tmp
    scratch=$(mktemp -d "$parent/wemmu-$SLURM_JOB_ID-XXXXXX")
    # shellcheck disable=SC2064
    trap "end_ray_node '$scratch'" EXIT
    trap : TERM
    # Images travel through the store only on their way to a model.
    WEMMU_RAY=$scratch "$PYTHON" -m ray.scripts.scripts start --block \
        --node-ip-address="$(node_address)" --temp-dir="$scratch" \
        --num-cpus="$SLURM_CPUS_PER_TASK" --object-store-memory=$((200 * 2 ** 20)) --disable-usage-stats \
        --include-log-monitor=false --dashboard-agent-listen-port=0 --dashboard-agent-grpc-port=0 "$@" &
    ray=$!
    # Told to end, it gives Ray a little time.
    wait "$ray" || for ((tenth = 0; tenth < 40; tenth++)); do
        kill -0 "$ray" 2>/dev/null || return 1
        sleep 0.1
    done
}

# Start Ray on $1 nodes from number $2 on, as process `step`, and wait until it runs on each.
# The rest is for `ray_node`.
start_nodes() {
    local nodes=$1 first=$2 log=$scratch/ray-$2.log
    shift 2
    : >"$log"
    srun --export=ALL --kill-on-bad-exit=1 --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --relative="$first" \
        --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c 'set -euo pipefail; ray_node "$@"' ray_node "$@" \
        </dev/null >"$log" 2>&1 &
    step=$!
    until [[ $(grep -cF 'Ray runtime started' "$log") == "$nodes" ]]; do
        kill -0 "$step" 2>/dev/null || {
            tail -n 20 "$log" >&2
            echo "Ray did not come up on $nodes nodes from number $first on" >&2
            return 1
        }
        sleep 0.2
    done
}

# Set `cluster` to the address of a head and `head` to its process. The attempts are for a port that is taken between
# the look and Ray's start and, below as well, for a busy machine: Ray gives up a node that is not up after 30 s, which
# is no option of it.
start_head() {
    local address port attempt
    address=$(node_address)
    for attempt in {0..9}; do
        port=$((PORTS_FROM + (SLURM_JOB_ID + 1009 * attempt) % PORTS))
        ! (exec 3<>"/dev/tcp/$address/$port") 2>/dev/null || continue
        cluster=$address:$port
        if start_nodes 1 0 --head --port="$port" --include-dashboard=false; then
            head=$step
            return
        fi
    done
    fail "no head of a Ray cluster came up on $address"
}

start_workers() {
    local nodes=$((SLURM_JOB_NUM_NODES - 1)) attempt
    ((nodes > 0)) || return 0
    for attempt in {0..4}; do
        ! start_nodes "$nodes" 1 --address="$cluster" || return 0
    done
    fail "Ray did not come up on every node"
}

# Steps are told first, which lets Ray end its processes; whoever does not listen is killed. All of it is to fit into
# the KillWait of Slurm (30 s by default, 10 s in .ci/slurm) of a cancelled job.
# shellcheck disable=SC2317,SC2329 # called by a trap
shut_down() {
    local tenth
    [[ -z $writer ]] || kill "$writer" 2>/dev/null || true
    rm -rf "$scratch"
    scancel --quiet --signal=TERM "$SLURM_JOB_ID" || true
    for ((tenth = 0; tenth < 80; tenth++)); do
        [[ -n $(jobs -rp) ]] || break
        sleep 0.1
    done
    jobs -rp | xargs --no-run-if-empty kill || true
    wait
}

# Write down how the job ends, by exit code `code`, put it back into the queue if that helps, and take Ray down.
# shellcheck disable=SC2317,SC2329 # called by a trap
finish() {
    local code=$?
    trap '' TERM INT USR1
    if [[ -n ${RUN-} ]]; then
        if note ended "$code"; then code=0; else code=$?; fi
    elif ((code == 138)) || { ((code)) && scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]'; }; then
        # A job that ends by itself counts as finished; only one that asks for it is queued again.
        echo "to be continued"
        scontrol requeue "$SLURM_JOB_ID" || true
    fi
    shut_down
    exit "$code"
}

main() {
    local cluster scratch step head writer='' code=0
    (($# > 0)) || fail "name a curriculum: sbatch slurm/data.sh CURRICULUM.yaml [options of the writer]"
    cd "$SLURM_SUBMIT_DIR"
    # shellcheck source=slurm/job.sh
    source "${WEMMU_HOME:-.}/slurm/job.sh"
    prepare
    export PYTHON SLURM_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
    RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
    export RAY_AUTH_TOKEN
    export -f node_address end_ray_node ray_node
    scratch=$(mktemp -dt "wemmu-$SLURM_JOB_ID-XXXXXX")
    note started
    trap finish EXIT
    # Its time is up soon.
    trap 'exit 138' USR1
    trap 'exit 143' TERM
    start_head
    start_workers
    echo "Ray runs on $SLURM_JOB_NODELIST, head $cluster"
    "$PYTHON" -m data_pipeline write "$@" --ray "$cluster" &
    writer=$!
    # Pre-emption ends the steps first, and without a head the writer would wait for ever.
    wait -n "$writer" "$head" || code=$?
    ! kill -0 "$writer" 2>/dev/null || { echo "Ray ended before the writer" >&2 && code=1; }
    exit "$code"
}

main "$@"
