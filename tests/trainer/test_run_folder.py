"""Two runs never write to one folder, and a run that wrote nothing leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from srft.options import load_config
from srft.record.folder import run_folder

ROOT = Path(__file__).parents[2]


def test_runs_started_together_get_folders_of_their_own(tmp_path: Path) -> None:
    """The second taker of a name gets a numbered folder, also while the first has written nothing yet."""
    config = load_config([f"runs_dir={tmp_path}/runs", "name=x"])
    with run_folder(config) as (first, _), run_folder(config) as (second, _):
        assert (first.name, second.name) == ("x", "x-2")
    assert not (tmp_path / "runs").exists()


def test_finished_run_is_left_alone_and_an_empty_folder_is_taken(tmp_path: Path) -> None:
    """A folder with metrics belongs to its run; one that merely exists does not."""
    config = load_config([f"runs_dir={tmp_path}", "name=x"])
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "console.log").touch()
    with run_folder(config) as (folder, _):
        assert folder.name == "x"
        (folder / "metrics.jsonl").touch()
    with run_folder(config) as (folder, _):
        assert folder.name == "x-2"
    assert (tmp_path / "x" / "metrics.jsonl").exists()


def test_resume_waits_for_the_writer_to_die(tmp_path: Path) -> None:
    """Resuming a run that another process writes to is refused, and allowed once that process is killed."""
    code = (
        "import time; from srft.options import load_config; from srft.record.folder import run_folder\n"
        f"with run_folder(load_config(['runs_dir={tmp_path}', 'name=x'])):\n"
        "    print('taken', flush=True); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert writer.stdout is not None and writer.stdout.readline() == "taken\n"
    config = load_config([f"runs_dir={tmp_path}", "name=x", "train.resume=true"])
    with pytest.raises(ValueError, match="another process is writing"), run_folder(config):
        pass
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    with run_folder(config) as (folder, checkpoint):
        assert (folder.name, checkpoint) == ("x", None)
