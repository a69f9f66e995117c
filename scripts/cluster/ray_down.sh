#!/usr/bin/env bash
# Ends the nodes that ray_up.sh FOLDER has started, and no others (`ray stop` would end every Ray on the machine).
set -uo pipefail
folder=$(cd "${1:?usage: ray_down.sh FOLDER}" && pwd) || exit 2
for file in $(ls -r "$folder"/node-*.pid 2> /dev/null); do
    pid=$(cat "$file")
    # A node is the leader of its session; the number may be another program's by now.
    [ "$(ps -o sid= -p "$pid" | tr -d ' ')" = "$pid" ] && tr '\0' ' ' < "/proc/$pid/cmdline" | grep -q ' start ' && kill "$pid"
    for _ in $(seq 60); do
        [ -z "$(ps -o pid= --sid "$pid")" ] && break
        sleep 0.25
    done
    [ -z "$(ps -o pid= --sid "$pid")" ] || pkill -9 -s "$pid"
done
