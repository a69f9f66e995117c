"""scripts/cluster: what the scripts do beside bringing up a cluster. They need neither Ray nor SLURM here."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANGS

SCRIPTS = Path(__file__).parents[2] / "scripts/cluster"
pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "ps", "pkill"))), reason="bash, ps and pkill are not here"
)


@pytest.fixture(name="start")
def start_fixture():
    """Starts a process that leads a session of its own, as a node does; what is left of it is ended."""
    started = []

    def start(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-c", "import time; time.sleep(60)", *arguments]
        started.append(subprocess.Popen(command, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def down(folder: Path) -> None:
    done = subprocess.run([SCRIPTS / "ray_down.sh", folder], capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr


def test_a_program_that_has_the_number_of_a_node_now_lives_on(start, tmp_path):
    process = start()
    (tmp_path / "node-0.pid").write_text(f"{process.pid}\n")
    (tmp_path / "node-1.pid").write_text("\n")  # of a node that was never started
    down(tmp_path)
    assert process.poll() is None


def test_a_node_is_ended_in_a_folder_with_a_blank_too(start, tmp_path):
    """Converse: what ray_up.sh has started has ``start`` among its arguments."""
    folder = tmp_path / "of a cluster"
    folder.mkdir()
    process = start("start", "--head")
    (folder / "node-0.pid").write_text(f"{process.pid}\n")
    ending = subprocess.Popen([SCRIPTS / "ray_down.sh", folder])  # it waits until this test has reaped the node
    assert process.wait(timeout=30) == -signal.SIGTERM
    assert ending.wait(timeout=30) == 0


@pytest.mark.parametrize(
    ("script", "function", "limit"), [("ray_up.sh", "until_alive", 120), ("slurm_up.sh", "until_ok", 60)]
)
@pytest.mark.parametrize("each", [1, 30])
def test_waiting_ends_by_the_clock_not_by_the_number_of_tries(script, function, limit, each, tmp_path):
    """Tries that take long, as on a busy machine, and such as fail at once: with a clock that a stand-in moves."""
    program = f"""
        eval "$(sed -n '/^{function}()/,/^}}/p' "$0")"
        timeout() {{ return 1; }}
        sleep() {{ tries=$((tries + 1)) SECONDS=$((SECONDS + {each})); }}
        folder=$1 address=nowhere tries=0 SECONDS=0
        {function} no-such-program 2> /dev/null
        echo "$? $tries"
    """
    command = ["bash", "-c", program, SCRIPTS / script, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=True)
    code, tries = map(int, done.stdout.split())
    assert code == 1 and limit / each - 2 <= tries <= limit / each


def test_nobody_else_reaches_the_database_of_accounting(tmp_path):
    """Its root has no password. SLURM's programs are stand-ins; that of the server says what it found."""
    programs = tmp_path / "bin"
    programs.mkdir()
    said = {"sinfo": "echo idle", "sacctmgr": "echo loopback", "mariadbd": 'stat -c %a "$FOLDER/db"; echo "$@"'}
    said["mariadb-install-db"] = 'stat -c %a "$FOLDER/db"'
    others = ("munged", "mariadb", "slurmdbd", "slurmctld", "slurmd", "sbatch", "sacct")
    for name, line in {**dict.fromkeys(others, "exit 0"), **said}.items():
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    folder = tmp_path / "slurm"
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "FOLDER": str(folder)}
    up = [SCRIPTS / "slurm_up.sh", folder]
    done = subprocess.run(up, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    mode, options = (folder / "mariadbd.log").read_text().splitlines()
    assert mode == (folder / "mariadb-install.log").read_text().strip() == "700"
    assert f"--socket={folder}/db/" in options
