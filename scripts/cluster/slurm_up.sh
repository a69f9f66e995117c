#!/usr/bin/env bash
# Brings up a SLURM of one node on this machine, on loopback, all of it below one folder: munge, accounting (slurmdbd over a
# MariaDB without network; submitit learns of killed jobs by sacct alone), controller and node. For trying things out:
#   sudo apt-get install --no-install-recommends munge slurm-wlm slurmdbd slurm-wlm-mysql-plugin mariadb-server-core mariadb-client-core
#   export SLURM_CONF=$(scripts/cluster/slurm_up.sh FOLDER [CPUS])     # FOLDER must be new; as root, or as the user that runs jobs
#   scripts/cluster/slurm_down.sh FOLDER
# CPUS: how many the node has (default: those of the machine); more than there are run more jobs at a time, each slower.
# Prints the path of slurm.conf; what it does goes to FOLDER/*.log.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
folder=${1:?usage: slurm_up.sh FOLDER [CPUS]}
missing=()
for program in munged mariadbd mariadb-install-db mariadb slurmdbd slurmctld slurmd sacctmgr sbatch sacct python3; do
    command -v "$program" > /dev/null || missing+=("$program")
done
if ((${#missing[@]})); then
    echo "slurm_up.sh: missing: ${missing[*]}; on Debian: apt-get install --no-install-recommends munge slurm-wlm slurmdbd" \
        "slurm-wlm-mysql-plugin mariadb-server-core mariadb-client-core" >&2
    exit 3
fi
if [ -e "$folder" ] && [ -n "$(ls -A "$folder")" ]; then
    echo "slurm_up.sh: $folder holds something; name a new folder, or remove it (after slurm_down.sh)" >&2
    exit 2
fi
mkdir -p "$folder"/{db,state,spool}
chmod 700 "$folder/db" # the database's root has no password: who reaches its socket may do everything
folder=$(cd "$folder" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
# A cluster that does not come up leaves no processes behind.
trap 'echo "slurm_up.sh: it did not come up; see $folder/*.log" >&2; "$here/slurm_down.sh" "$folder" >&2 || true' ERR
user=$(id -un) host=$(hostname -s)
cpus=${2:-$(nproc)}
memory=$(($(awk '/^MemTotal/ {print $2}' /proc/meminfo) / 1024))
read -r controller_port node_port dbd_port < <(python3 - <<'PYTHON'
import socket
sockets = [socket.socket() for _ in range(3)]
for one in sockets:
    one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in sockets))
PYTHON
)

# Waits until a command succeeds: up to 60 seconds, however fast or slow it fails.
until_ok() {
    local end=$((SECONDS + 60))
    while ((SECONDS < end)); do
        if timeout 5 "$@" > /dev/null 2> "$folder/last-error.log"; then return 0; fi
        sleep 0.25
    done
    echo "slurm_up.sh: not within 60 seconds: $*" >&2
    return 1
}

(umask 077 && head -c 1024 /dev/urandom > "$folder/munge.key")
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" > "$folder/munged.out.log" 2>&1

mariadb-install-db --no-defaults --user="$user" --datadir="$folder/db" --auth-root-authentication-method=normal \
    --skip-test-db > "$folder/mariadb-install.log" 2>&1
setsid mariadbd --no-defaults --user="$user" --datadir="$folder/db" --socket="$folder/db/socket" --skip-networking \
    --pid-file="$folder/mariadbd.pid" --innodb-buffer-pool-size=64M > "$folder/mariadbd.log" 2>&1 < /dev/null &
until_ok mariadb --no-defaults --socket="$folder/db/socket" --user=root -e "CREATE DATABASE IF NOT EXISTS slurm"

cat > "$folder/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
DbdHost=localhost
DbdPort=$dbd_port
SlurmUser=$user
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
LogFile=$folder/slurmdbd.log
PidFile=$folder/slurmdbd.pid
CONF
chmod 600 "$folder/slurmdbd.conf"
cat > "$folder/slurm.conf" <<CONF
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller_port
SlurmdPort=$node_port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdTimeout=20
SchedulerParameters=sched_interval=2,batch_sched_delay=0
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort=$dbd_port
AccountingStoragePass=$folder/munge.socket
JobAcctGatherType=jobacct_gather/none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$folder/slurm.conf
MYSQL_UNIX_PORT=$folder/db/socket slurmdbd > "$folder/slurmdbd.out.log" 2>&1
until_ok sacctmgr --noheader --immediate list cluster
slurmctld > "$folder/slurmctld.out.log" 2>&1
slurmd -N "$host" > "$folder/slurmd.out.log" 2>&1
until_ok sh -c 'sinfo --noheader --format=%t | grep -qx idle'
until_ok sh -c 'sacctmgr --noheader list cluster | grep -q loopback' # the controller registers itself
echo "$SLURM_CONF"
