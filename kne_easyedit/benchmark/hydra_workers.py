"""Jobs of a Hydra sweep on other machines: they must find what its start found; their progress is shown there.

A launcher (joblib, Ray, SLURM) sends the callback below to every job, as it was when the sweep started.
"""

from __future__ import annotations

import atexit
import os
import platform
import shutil
import socket
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from kne_easyedit import _version, bridge
from kne_easyedit._util.digest import digest
from kne_easyedit._util.files import parse_json
from kne_easyedit.benchmark.config import job_folder
from kne_easyedit.benchmark.hydra_sweep import jobs_of_sweep, plain_settings
from kne_easyedit.benchmark.store import read_lines
from kne_easyedit.facts.readers import data_digest

DATA = ("data", "data.file", "data.localization.file", "statistics.file")
"""Settings that name data files."""
EVERY = 5.0
"""Seconds between two looks at the results of the jobs."""
PATIENCE = 10.0
"""Seconds within which a cluster must answer."""
_COMPLAINTS: list[str] = []
"""What is wrong for the job that runs in this process. A callback that raises is only warned of by Hydra."""


class SameEverywhere(Callback):
    """Compares each job's versions and data with those of the sweep's start; shows progress and a summary there."""

    def __init__(self) -> None:
        self.expected: dict[str, str] | None = None
        """`surroundings` of the sweep's start, on ``host``."""
        self.host = platform.node()
        self.watch: Watch | None = None

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        """Called by Hydra where the sweep starts, before any job. Raises SystemExit if there is no cluster."""
        if complaint := lacks_cluster(config.hydra.launcher):
            raise SystemExit(f"kne: {complaint}")  # an exception Hydra would turn into a warning
        # A relative folder means that of the command, also where a worker runs in another one.
        folder = Path(config.hydra.sweep.dir).absolute()
        quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
        config.hydra.sweep.dir = str(folder)
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{quoted}'")
        jobs = jobs_of_sweep(config)
        self.expected = surroundings({file for job in jobs for file in data_files(job)})
        in_this_process = config.hydra.launcher._target_.endswith("BasicLauncher")
        if jobs and not in_this_process and all("evaluation" in job and "study" not in job for job in jobs):
            self.watch = Watch([job_folder(job).absolute() for job in jobs], folder)
            self.watch.start()

    def on_multirun_end(self, config: Any, **_: Any) -> None:
        """Called by Hydra where the sweep has started, if all jobs have succeeded."""
        if self.watch is not None:
            self.watch.stop()

    def on_job_start(self, config: Any, **_: Any) -> None:
        """Called by Hydra where a job runs."""
        del _COMPLAINTS[:]
        if self.expected is not None:
            cwd = config.hydra.runtime.cwd
            if not Path(cwd).is_dir():
                _COMPLAINTS.append(
                    f"{cwd}, the folder of the command on {self.host}, does not exist on {platform.node()}; all "
                    f"machines of a sweep need the same shared folder under the same path"
                )
                return
            os.chdir(cwd)
            settings = plain_settings(config)
            if found := differences(self.expected, surroundings(data_files(settings)), data_files(settings)):
                _COMPLAINTS.append(
                    f"{platform.node()} differs from {self.host}, where the sweep has started: {'; '.join(found)}. "
                    f"Reports would refuse to mix the results; install the same versions and share the same files"
                )

    def __getstate__(self) -> dict[str, Any]:
        """Jobs get it without what watches them."""
        return {**self.__dict__, "watch": None}


def lacks_cluster(launcher: Any) -> str | None:
    """Why a launcher has no cluster here, as far as that is seen at once; None if nothing is missing.

    Args:
        launcher: Its configuration, ``hydra.launcher``.
    """
    kind = launcher._target_.rpartition(".")[2]
    if kind == "SlurmLauncher" and shutil.which("sbatch") is None:
        return "hydra/launcher=slurm: there is no `sbatch` on this machine; give the command where SLURM's programs are"
    if kind == "RayLauncher":
        address = launcher.ray.init.get("address")
        source = "hydra.launcher.ray.init.address"
        if address == "auto":
            address, source = os.environ.get("RAY_ADDRESS"), "RAY_ADDRESS"
        host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
        if colon and port.isdigit():
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
            except OSError as error:
                return (
                    f"{source}: nothing answers at {address} ({error.strerror or error}); start Ray there (`ray start "
                    f"--head`), or name the address that it has printed"
                )
    return None


def begin_job() -> None:
    """To be called first by a job of a sweep. Raises ValueError if its machine is not as the sweep needs it."""
    if _COMPLAINTS:
        raise ValueError("; ".join(_COMPLAINTS))


def surroundings(files: Iterable[str]) -> dict[str, str]:
    """What results depend on beside settings and model: name -> version or digest; of nothing else than that.

    Args:
        files: Data files; one that is not there has the digest ``none``.
    """
    import peft
    import torch
    import transformers

    package = Path(_version.__file__).parent
    sources = digest([[str(p.relative_to(package)), p.read_text("utf-8")] for p in sorted(package.rglob("*.py"))])
    try:
        easyedit = " ".join(bridge.describe().values())
    except ImportError:
        easyedit = "none"
    return {
        "kne_easyedit": f"{_version.__version__} (sources {sources[:8]})",
        "EasyEdit": easyedit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "KNE_PATCHES_OFF": os.environ.get("KNE_PATCHES_OFF", ""),
        **{f"data {file}": (data_digest(file) or "none")[:16] for file in files},
    }


def differences(expected: Mapping[str, str], found: Mapping[str, str], files: Iterable[str]) -> list[str]:
    """What differs, as texts.

    Args:
        expected: `surroundings` where the sweep has started, with the files of all jobs.
        found: `surroundings` of a job.
        files: The files of the job.
    """
    names = [name for name in expected if not name.startswith("data ")] + [f"data {file}" for file in files]
    return [
        f"{name}: {found.get(name) or 'unset'} here, {expected[name] or 'unset'} there"
        for name in names
        if name in expected and found.get(name) != expected[name]
    ]


def data_files(settings: Mapping[str, Any]) -> list[str]:
    """The data files that a job's settings name."""
    files = []
    for name in DATA:
        value: Any = settings
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, str) and value not in files:
            files.append(value)
    return files


class Watch(threading.Thread):
    """Shows how many edits of a sweep's jobs are done, whatever runs them: it reads their folders.

    Args:
        folders: Of the jobs.
        logs: The folder of their logs, for the summary.
    """

    def __init__(self, folders: list[Path], logs: Path) -> None:
        super().__init__(daemon=True, name="progress of a sweep")
        self.folders, self.logs, self._stopped = folders, logs, threading.Event()
        atexit.register(self.stop)  # a sweep that fails or is interrupted has a summary, too

    def run(self) -> None:
        """Prints a line whenever something has changed."""
        shown = ""
        while not self._stopped.wait(EVERY):
            found = [progress_of(folder) for folder in self.folders]
            done, wanted = (sum(values) for values in zip(*found))
            complete = sum(d >= w > 0 for d, w in found)
            text = f"sweep: {complete} of {len(found)} jobs complete, {done} edits done of {wanted} that are known"
            if text != shown:
                print(text, file=sys.stderr, flush=True)
                shown = text

    def stop(self) -> None:
        """Ends it with a summary; once."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        found = [(folder, *progress_of(folder)) for folder in self.folders]
        lacking = [one for one in found if not one[1] >= one[2] > 0]
        print(f"\nsweep: {len(found) - len(lacking)} of {len(found)} jobs complete; logs: {self.logs}", file=sys.stderr)
        for folder, done, wanted in lacking:
            known = f"{done} of {wanted} edits" if wanted else "not begun"
            print(f"  incomplete: {folder} ({known}); the same command resumes it", file=sys.stderr)


def progress_of(folder: Path) -> tuple[int, int]:
    """How many edits of a job are done, and how many there are; the latter is 0 before its manifest is written."""
    try:
        manifest = parse_json((folder / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return 0, 0
    own = set(manifest["fingerprints"].values())
    lines = (line for _, line in read_lines(folder / "results.jsonl"))
    done = {(line.get("method"), line.get("index")) for line in lines if line.get("fingerprint") in own}
    return len(done), len(manifest["data"]["records"]) * len(manifest["methods"])
