#!/usr/bin/env bash
# Brings up a Ray cluster on this machine, on loopback: a head and further nodes, all of it below one folder. For trying
# things out, with the `ray` that is found first in PATH:
#   export RAY_ADDRESS=$(scripts/cluster/ray_up.sh FOLDER [NODES [CPUS]])     # FOLDER must be new, its path short: Ray
#   scripts/cluster/ray_down.sh FOLDER                                        # has sockets in it
# NODES: how many, the head included (default 2), each with CPUS processors (default 1). Their jobs have the environment of
# this call (PYTHONPATH, KNE_CACHE, EASYEDIT_HOME, ...). Prints the address. FOLDER/node-N.pid names the process of a node,
# FOLDER/node-N.log has what it says.
set -euo pipefail
folder=${1:?usage: ray_up.sh FOLDER [NODES [CPUS]]} nodes=${2:-2} cpus=${3:-1}
if ! command -v ray > /dev/null; then
    echo "ray_up.sh: missing: ray; pip install ray" >&2
    exit 3
fi
if [ -e "$folder" ] && [ -n "$(ls -A "$folder")" ]; then
    echo "ray_up.sh: $folder holds something; name a new folder, or remove it (after ray_down.sh)" >&2
    exit 2
fi
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
trap 'echo "ray_up.sh: it did not come up; see $folder/node-*.log" >&2; "$here/ray_down.sh" "$folder" >&2 || true' ERR
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
address=127.0.0.1:$port

# Starts a node that stays until its process ends: start_node NUMBER OPTIONS...
start_node() {
    local number=$1
    shift
    setsid ray start "$@" --block --node-ip-address=127.0.0.1 --num-cpus="$cpus" --num-gpus=0 --object-store-memory=100000000 \
        --min-worker-port=0 --max-worker-port=0 --disable-usage-stats > "$folder/node-$number.log" 2>&1 < /dev/null &
    echo $! > "$folder/node-$number.pid"
}

# Waits until so many nodes are alive: up to two minutes, however long one look takes.
until_alive() {
    local end=$((SECONDS + 120))
    while ((SECONDS < end)); do
        if timeout 20 ray status --address="$address" 2> /dev/null | grep -c ' node_[0-9a-f]' | grep -qx "$1"; then return 0; fi
        sleep 1
    done
    return 1
}

start_node 0 --head --port="$port" --include-dashboard=false --temp-dir="$folder/ray"
until_alive 1
for number in $(seq 1 $((nodes - 1))); do
    start_node "$number" --address="$address"
done
until_alive "$nodes"
echo "$address"
