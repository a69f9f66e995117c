#!/usr/bin/env bash
# Ends the SLURM that slurm_up.sh FOLDER has started, its jobs first. The folder stays, with its logs: remove it by hand.
set -uo pipefail
folder=$(cd "${1:?usage: slurm_down.sh FOLDER}" && pwd) || exit 2
export SLURM_CONF=$folder/slurm.conf
if [ -s "$folder/slurmctld.pid" ] && kill -0 "$(cat "$folder/slurmctld.pid")" 2> /dev/null; then
    scancel --user="$(id -un)" 2> /dev/null
    for _ in $(seq 40); do # running jobs end first; they would outlive their node
        [ -z "$(squeue --noheader 2> /dev/null)" ] && break
        sleep 0.25
    done
fi
for name in slurmd slurmctld slurmdbd mariadbd munged; do
    file=$folder/$name.pid
    [ -s "$file" ] || continue
    pid=$(cat "$file")
    # The number may be another program's by now.
    [ "$(cat "/proc/$pid/comm" 2> /dev/null | cut -c1-6)" = "$(echo "$name" | cut -c1-6)" ] || continue
    kill "$pid"
    for _ in $(seq 80); do
        kill -0 "$pid" 2> /dev/null || break
        sleep 0.25
    done
    if kill -0 "$pid" 2> /dev/null; then
        echo "slurm_down.sh: $name ($pid) does not end; it is killed" >&2
        kill -9 "$pid"
    fi
done
