"""One start at a time in a workdir, whatever an earlier one left, and none needed to read."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys

import pytest

from jaxdistill import main, run_folder
from jaxdistill.errors import InputError
from tests.adversity.conftest import CONDENSE, contents


@pytest.mark.slow
def test_leftovers_of_a_killed_save_are_gone_before_the_first_save(tmp_path):
    inner = tmp_path / "checkpoints/2.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp/d"
    inner.mkdir(parents=True)
    for number in range(10_000):
        (inner / str(number)).touch()
    (tmp_path / "checkpoints/4.orbax-checkpoint-tmp").touch()
    main.run([*CONDENSE, f"--workdir={tmp_path}"])
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "4"}


@pytest.mark.slow
def test_a_second_start_says_who_is_there_and_changes_nothing(copied):
    flags, workdir = copied
    with run_folder.opened(workdir, {}):
        before = contents(workdir)
        with pytest.raises(InputError, match=rf"is in use by process {os.getpid()} on "):
            main.run([*flags, f"--workdir={workdir}"])
        assert contents(workdir) == before
    main.run([*flags, f"--workdir={workdir}"])


def test_the_lock_ends_with_its_process(tmp_path):
    program = (
        "import pathlib, sys, time\n"
        "from jaxdistill import run_folder\n"
        "with run_folder.opened(pathlib.Path(sys.argv[1]), {}):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(InputError, match=f"process {holder.pid} "),
            run_folder.opened(tmp_path, {}),
        ):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with run_folder.opened(tmp_path, {}):
        pass


@contextlib.contextmanager
def _read_only(folder):
    mount = ["mount", "--bind", "-o", "ro", str(folder), str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_finished_run_is_read_where_nothing_can_be_written(copied, mode, capsys):
    flags, workdir = copied
    main.run([*flags, f"--workdir={workdir}"])
    table = capsys.readouterr().out
    before = contents(workdir)
    with _read_only(workdir):
        main.run([*flags, f"--workdir={workdir}", f"--mode={mode}"])
        assert capsys.readouterr().out == table
        with pytest.raises(InputError, match="cannot make the workdir"):
            main.run([*flags, f"--workdir={workdir / 'inner'}"])
    assert contents(workdir) == before


def test_deleted_pictures_are_drawn_again(copied):
    flags, workdir = copied
    drawn = {p.relative_to(workdir): p.read_bytes() for p in workdir.rglob("*.png")}
    assert drawn
    for name in drawn:
        (workdir / name).unlink()
    main.run([*flags, f"--workdir={workdir}"])
    assert {p.relative_to(workdir): p.read_bytes() for p in workdir.rglob("*.png")} == drawn


def test_a_path_may_begin_with_the_home(tmp_path, monkeypatch, finished):
    flags, workdir = finished
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(workdir, tmp_path / "run")
    main.run([*flags, "--workdir=~/run", "--mode=eval"])
    assert not (tmp_path / "~").exists()
    with pytest.raises(InputError, match="no such folder: '~nobody-here/run'"):
        main.run([*flags, "--workdir=~nobody-here/run"])
