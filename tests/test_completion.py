"""What shells complete, asked of the shells themselves."""

import os
import pty
import re
import select
import shutil
import subprocess
import time

import pytest

from jaxdistill import completion, describe, keywords, main, settings
from jaxdistill import config as configs
from jaxdistill.errors import InputError

LINES = {
    "li": ["list"],
    "--m": ["--mode="],
    "--mode=e": ["--mode=eval", "--mode=export"],
    "--con": ["--config="],
    "--config=ncf": ["--config=ncfm"],
    "--config=ncfm:dataset=fa": ["--config=ncfm:dataset=fashion_mnist"],
    "--config=ncfm:smoke,ip": ["--config=ncfm:smoke,ipc="],
    "--config=flow:dataset=so": ["--config=flow:dataset=soft4"],
    "--config=ncfm --config.m": ["--config.method."],
    "--config=ncfm:smoke --config.method.samp": [
        "--config.method.sampler=",
        "--config.method.sampler_clip=",
        "--config.method.sampler_learning_rate=",
    ],
    "--config=ncfm --config.run.tensorboard=": [
        "--config.run.tensorboard=False",
        "--config.run.tensorboard=True",
    ],
    "--config=genrecal --config.method.name=genr": ["--config.method.name=genrecal"],
    "describe herd": ["herding"],
    "describe ncfm:sm": ["ncfm:smoke"],
    "completion f": ["fish"],
    "list ": [],
    "--config=nothing --config.method.": [],
}

WORDS = completion.words(main._flags())


def needs(shell):
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"no {shell} here")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The folder with the script of each shell, as the command line prints them."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in completion.SHELLS:
        (folder / shell).write_text(completion.script(shell, main._flags()))
    return folder


def asked(folder, shell, line, ask):
    command = [shell, "-c", f"source ./{shell}\n{ask}", shell, line]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return [word for word in done.stdout.splitlines() if word]


BASH = """
COMP_LINE="jaxdistill $1" COMP_POINT=$((${#1} + 11)) COMP_WORDBREAKS=
_jaxdistill
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize("line", LINES)
def test_bash_completes(scripts, line):
    assert asked(scripts, "bash", line, BASH) == LINES[line]


@needs("fish")
@pytest.mark.parametrize("line", LINES)
def test_fish_completes(scripts, line):
    assert asked(scripts, "fish", line, 'complete -C "jaxdistill $argv[2]"') == LINES[line]


TYPED = ("--config=ncfm:data\t", "fash\t", "--config.method.real_d\t", "b\t", "--dr\t", "\n")
MEANT = ["--config=ncfm:dataset=fashion_mnist", "--config.method.real_dtype=bfloat16", "--dry_run"]


def arguments(scripts, shell, setup):
    """What a program gets from a line that is typed at a terminal, with the key in between."""
    process, terminal = pty.fork()
    if process == 0:
        quiet = {"bash": ["--norc", "--noprofile"], "zsh": ["-f"]}[shell]
        os.chdir(scripts)
        plain = {"TERM": "dumb", "HOME": str(scripts), "PATH": os.environ["PATH"]}
        os.execve(shutil.which(shell), [shell, *quiet, "-i"], plain)
    shown, ends = "", time.monotonic() + 60
    program = """jaxdistill() { printf '<%s>' "$@"; echo; }"""
    try:
        for part in (f"{setup}; {program}; echo rea''dy\n", "jaxdistill ", *TYPED):
            os.write(terminal, part.encode())
            # It has answered when it is silent for a while.
            while time.monotonic() < ends:
                if select.select([terminal], [], [], 0.7)[0]:
                    shown += os.read(terminal, 65536).decode(errors="replace")
                elif "ready" in shown:
                    break
    finally:
        os.kill(process, 9)
        os.waitpid(process, 0)
        os.close(terminal)
    return re.findall(r"<(-[^<>]*)>", shown.rpartition("ready")[2])


def test_bash_completes_at_the_key(scripts):
    assert arguments(scripts, "bash", "source ./bash") == MEANT


@needs("zsh")
@pytest.mark.parametrize("place", ["start-up file", "folder of completions"])
def test_zsh_completes_at_the_key(scripts, place):
    begin = "autoload -Uz compinit; compinit -u -D"
    if place == "start-up file":
        setup = f"{begin}; source ./zsh"
    else:
        shutil.copy(scripts / "zsh", scripts / "_jaxdistill")
        setup = f"fpath=($PWD $fpath); {begin}"
    assert arguments(scripts, "zsh", setup) == MEANT


def test_folders_are_completed(scripts):
    (scripts / "runs").mkdir()
    assert asked(scripts, "bash", "--config=ncfm --workdir=ru", BASH) == ["runs"]


@pytest.mark.parametrize("name", sorted(configs.shipped()))
def test_every_setting_is_there_and_no_other(name):
    flags = WORDS[f"settings {name}"]
    config = configs.load(name).to_dict()
    found = {}
    for flag in flags:
        path, _, value = flag.removeprefix("--config.").partition("=")
        found.setdefault(path, []).append(value)
    assert set(found) == set(completion._paths(config))
    for path, values in found.items():
        if values != [""] and not path.endswith("name") and path != "family":
            keyword = settings.keyword(config, path.split("."))
            for value in values:
                keywords.check(
                    path, keyword, {"True": True, "False": False, "None": None}.get(value, value)
                )


def test_words_are_those_that_can_be_described_and_loaded():
    known = WORDS
    for name in known["describe"]:
        assert describe.described(name)
    assert known["argument ncfm"][-1] == "smoke" and "seed=" in known["argument flow"]
    assert {f"--mode={mode}" for mode in main.MODES} < set(known["flags"])


def test_another_shell_is_refused():
    with pytest.raises(InputError, match="no completion for 'tcsh'; choose from bash, fish, zsh"):
        main.run(["completion", "tcsh"])
