#!/usr/bin/env bash
# Ends the nodes that ray_up.sh FOLDER has started, and no others (`ray stop` would end every Ray on the machine).
set -uo pipefail
shopt -s nullglob
folder=$(cd "${1:?usage: ray_down.sh FOLDER}" && pwd) || exit 2
files=("$folder"/node-*.pid)
for ((number = ${#files[@]} - 1; number >= 0; number--)); do # the head last
    pid=$(cat "${files[number]}")
    [[ $pid =~ ^[1-9][0-9]*$ ]] || continue
    if [ -e "/proc/$pid" ]; then
        # A node is the leader of its session. The number may be another program's by now: that one is left alone.
        [ "$(ps -o sid= -p "$pid" | tr -d ' ')" = "$pid" ] && tr '\0' ' ' < "/proc/$pid/cmdline" | grep -q ' start ' || continue
        kill "$pid"
    fi
    # Without its leader, a session may have workers left: its number is nobody else's as long as it has.
    for _ in $(seq 60); do
        [ -z "$(ps -o pid= --sid "$pid")" ] && break
        sleep 0.25
    done
    [ -z "$(ps -o pid= --sid "$pid")" ] || pkill -9 -s "$pid"
done
