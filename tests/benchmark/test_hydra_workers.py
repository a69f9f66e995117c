"""Jobs of a sweep on other machines: what differs there ends a job before its work; progress is read from folders."""

from __future__ import annotations

import json
import pickle
import socket
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from kne_easyedit.benchmark import hydra_workers
from kne_easyedit.benchmark.hydra_workers import (
    SameEverywhere,
    Watch,
    begin_job,
    lacks_cluster,
    progress_of,
    surroundings,
)


@pytest.fixture(name="config")
def config_fixture(tmp_path, monkeypatch):
    """The configuration of a job, as Hydra hands it to a callback; its data file is in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("records.json").write_text("[1]")
    monkeypatch.setattr(hydra_workers, "_COMPLAINTS", [])
    return OmegaConf.create({"data": {"file": "records.json"}, "hydra": {"runtime": {"cwd": str(tmp_path)}}})


def on_a_worker(expected: dict | None, config) -> None:
    """What a job does first, with the callback as a launcher sends it."""
    callback = SameEverywhere()
    callback.expected, callback.host = expected, "login"
    pickle.loads(pickle.dumps(callback)).on_job_start(config)
    begin_job()


def test_a_machine_like_the_first_one_works(config):
    on_a_worker(surroundings(["records.json"]), config)
    on_a_worker(None, config)  # a single job has nothing to be compared with


@pytest.mark.parametrize(
    ("name", "here", "there"),
    [
        ("kne_easyedit", r"\S+ \(sources \w{8}\)", "9.9.9 (sources 0123abcd)"),
        ("EasyEdit", ".*", "checkout 14cea82"),
        ("torch", ".*", "1.0"),
        ("KNE_PATCHES_OFF", "unset", "all"),
        ("data records.json", "[0-9a-f]{16}", "0123456789abcdef"),
    ],
)
def test_what_differs_is_named_with_both_sides(config, name, here, there):
    expected = {**surroundings(["records.json"]), name: there}
    with pytest.raises(ValueError, match=rf"differs from login.*: {name}: {here} here, ") as caught:
        on_a_worker(expected, config)
    assert f"{there} there" in str(caught.value) and "; " not in str(caught.value).partition(" there")[0]
    on_a_worker(surroundings(["records.json"]), config)  # a later job of the same process is judged by itself


def test_a_worker_without_easyedit(config, monkeypatch):
    expected = surroundings(["records.json"])

    def describe():
        raise ImportError("EasyEdit is not installed")

    monkeypatch.setattr(hydra_workers.bridge, "describe", describe)
    with pytest.raises(ValueError, match=r"EasyEdit: none here, \w+ .* there"):
        on_a_worker(expected, config)


def test_a_worker_without_the_data(config):
    expected = surroundings(["records.json"])
    Path("records.json").unlink()
    with pytest.raises(ValueError, match=r"data records.json: none here, [0-9a-f]{16} there"):
        on_a_worker(expected, config)


def test_a_machine_without_the_shared_folder(config, tmp_path):
    config.hydra.runtime.cwd = str(tmp_path / "shared")
    with pytest.raises(ValueError, match=r"shared, the folder of the command on login, does not exist on .*same path"):
        on_a_worker(surroundings(["records.json"]), config)


def test_files_of_other_jobs_do_not_count(config):
    on_a_worker({**surroundings(["records.json"]), "data another.json": "0123456789abcdef"}, config)


def test_logs_go_to_the_folder_of_the_command_wherever_a_job_runs(tmp_path, monkeypatch):
    """Hydra makes a relative folder absolute in the job's process, which may run in another folder."""
    place = tmp_path / "it's"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setattr(hydra_workers, "jobs_of_sweep", lambda config: [])
    launcher = {"_target_": "a.BasicLauncher"}
    hydra = {"sweep": {"dir": "out/logs"}, "overrides": {"hydra": []}, "launcher": launcher}
    config = OmegaConf.create({"hydra": hydra})
    SameEverywhere().on_multirun_start(config)
    assert config.hydra.sweep.dir == str(place / "out/logs")
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(config_dir=str(Path(__file__).parents[2] / "hparams"), version_base="1.3"):
        found = compose("benchmark", overrides=list(config.hydra.overrides.hydra), return_hydra_config=True)
    assert found.hydra.sweep.dir == str(place / "out/logs")
    GlobalHydra.instance().clear()


# A cluster

RAY = "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"
SLURM = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"


def launcher(target: str, address: str | None = None):
    return OmegaConf.create({"_target_": target, "ray": {"init": {"address": address}}})


@pytest.fixture(name="port")
def port_fixture():
    """A port of this machine at which something answers, until its socket is closed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_an_address_at_which_nothing_answers_is_named_with_the_setting_that_has_it(port, monkeypatch):
    address = f"127.0.0.1:{port.getsockname()[1]}"
    assert lacks_cluster(launcher(RAY, address)) is None
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert lacks_cluster(launcher(RAY, "auto")) is None
    port.close()
    said = lacks_cluster(launcher(RAY, f"ray://{address}"))
    assert said.startswith(f"hydra.launcher.ray.init.address: nothing answers at ray://{address} (Connection refused)")
    assert lacks_cluster(launcher(RAY, "auto")).startswith(f"RAY_ADDRESS: nothing answers at {address}")
    monkeypatch.delenv("RAY_ADDRESS")
    assert lacks_cluster(launcher(RAY, "auto")) is None, "Ray looks for one on this machine"


def test_a_machine_without_slurm(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no `sbatch` on this machine" in lacks_cluster(launcher(SLURM))
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    assert lacks_cluster(launcher(SLURM)) is None
    assert lacks_cluster(launcher("hydra._internal.core_plugins.basic_launcher.BasicLauncher")) is None


def test_a_sweep_without_a_cluster_ends_before_its_jobs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    config = OmegaConf.create({"hydra": {"launcher": {"_target_": SLURM}}})
    with pytest.raises(SystemExit, match="kne: hydra/launcher=slurm"):
        SameEverywhere().on_multirun_start(config)


# Progress


@pytest.fixture(name="folder")
def folder_fixture(tmp_path) -> Path:
    """A job of two methods and two records, one line of which is of other settings."""
    manifest = {"fingerprints": {"KNE": "k", "FT": "f"}, "methods": {"KNE": {}, "FT": {}}, "data": {"records": [0, 1]}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    lines = [("KNE", 0, "k"), ("FT", 0, "f"), ("KNE", 1, "older"), ("KNE", 0, "k")]
    text = "".join(json.dumps({"method": m, "index": i, "fingerprint": f}) + "\n" for m, i, f in lines)
    (tmp_path / "results.jsonl").write_text(text + '{"method": "FT", "ind')
    return tmp_path


def test_progress_is_that_of_the_settings_of_now_and_of_complete_lines(folder, tmp_path):
    assert progress_of(folder) == (2, 4)
    assert progress_of(tmp_path / "none") == (0, 0)


def test_the_summary_names_what_is_incomplete_and_the_logs_once(folder, tmp_path, capsys):
    watch = Watch([folder, tmp_path / "none"], tmp_path / "logs")
    watch.stop()
    watch.stop()
    said = capsys.readouterr().err
    assert said.count("sweep: 0 of 2 jobs complete; logs: ") == 1 and str(tmp_path / "logs") in said
    assert f"incomplete: {folder} (2 of 4 edits); the same command resumes it" in said
    assert f"incomplete: {tmp_path / 'none'} (not begun)" in said
