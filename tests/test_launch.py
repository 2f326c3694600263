"""The scripts by which runs are started elsewhere: what they say is right, and what they do."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from jaxdistill import config as configs
from jaxdistill import main

LAUNCH = Path(__file__).resolve().parents[1] / "docs" / "examples" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


def checked(arguments):
    """The arguments are those of the command line, and the config is there."""
    spec, overrides, rest = main._split(arguments)
    assert configs.load(spec, overrides).method
    main._flags()(["jaxdistill", *rest])
    assert any(flag.startswith("--workdir=") for flag in rest)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_scripts(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_the_job_of_slurm_starts_can_be_started():
    joined = (LAUNCH / "slurm.sh").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^srun .*? jaxdistill (.*)$", joined, re.MULTILINE)
    checked(shlex.split(line.replace("$workdir", "runs")))


def test_the_job_of_kubernetes_starts_what_can_be_started_and_knows_the_exit_codes():
    job = yaml.safe_load((LAUNCH / "gke.yaml").read_text())["spec"]
    (container,) = job["template"]["spec"]["containers"]
    checked(container["args"])
    rules = job["podFailurePolicy"]["rules"]
    codes = {r["action"]: r["onExitCodes"] for r in rules if "onExitCodes" in r}
    assert codes["Ignore"]["values"] == [main.EXIT_INTERRUPTED]
    assert codes["FailJob"]["values"] == [1]
    assert {c["containerName"] for c in codes.values()} == {container["name"]}
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # which such a policy needs
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_container_installs_what_is_there():
    text = (LAUNCH / "Containerfile").read_text()
    (lock,) = re.findall(r"-c (\S+)", text)
    assert (LAUNCH.parents[2] / lock).is_file()
    assert f"python:3.{lock[-6:-4]}-slim" in text


@pytest.fixture
def programs(tmp_path):
    """A folder of programs for a script: `jaxdistill` ends with one given code after another."""

    def run(name, codes, *arguments, **environment):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        written = {
            "srun": 'shift; exec "$@"',
            "scontrol": 'echo "scontrol $*" >> said',
            "jaxdistill": 'echo "jaxdistill $*" >> said; code=$(head -1 codes)\n'
            "sed -i 1d codes; [ $code = wait ] && exec sleep 60; exit $code",
        }
        for program, text in written.items():
            (folder / program).write_text(f"#!/bin/bash\n{text}\n")
            (folder / program).chmod(0o755)
        own = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"} | environment
        command = ["bash", LAUNCH / name, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=own, timeout=60)
        return done.returncode, (tmp_path / "said").read_text().splitlines()

    return run


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (75, True)])
def test_slurm_gets_a_job_back_that_was_asked_to_stop(programs, code, again):
    ended, said = programs("slurm.sh", [code], SLURM_JOB_ID="77", WORKDIR="/w")
    assert ended == (0 if again else code)
    assert ("scontrol requeue 77" in said) == again
    assert "--workdir=/w" in said[0]


def test_a_run_is_started_until_it_is_done(programs):
    assert programs("again.sh", [75, 75, 0], "--config=ncfm") == (
        0,
        ["jaxdistill --config=ncfm"] * 3,
    )


def test_what_is_wrong_is_not_started_again(programs):
    assert programs("again.sh", [75, 1, 0])[0] == 1


def test_a_session_that_ends_is_left_in_time(programs):
    assert programs("again.sh", ["wait", 0], LIMIT="1s") == (75, ["jaxdistill "])
