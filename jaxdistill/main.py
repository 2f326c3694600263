"""The command line: flags to config to run. The only module with flags.

    jaxdistill --config=NAME[:ARGUMENT] --workdir=FOLDER [--mode=MODE] [--config.KEY=VALUE …]

--config    a shipped config or the path of one, with its argument string; any setting in it can
            be overridden by --config.a.b=value
--workdir   where everything goes; the same command goes on with an interrupted run
--mode      train distils and evaluates, eval evaluates the artefact in the workdir again;
            compile says what the run costs on a TPU slice, with neither the slice nor the data,
            and export writes its program as StableHLO
--topology  the slice to compile for, such as v5e:16x16; the workdir is then optional
--distributed  for several processes: auto on SLURM and TPU pods, else HOST:PORT,PROCESSES,INDEX;
            the workdir must be one that all of them reach
"""

import ast
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from absl import flags

from jaxdistill import config as configs
from jaxdistill.errors import InputError, Interrupted

EXIT_INTERRUPTED = 75
"""Exit code after SIGTERM: what was done is kept, and the same command goes on. It is EX_TEMPFAIL
of sysexits.h; docs/running.md lists the other codes."""

MODES = ("train", "eval", "compile", "export")


def _split(argv: list[str]) -> tuple[str | None, dict[str, str], list[str]]:
    """Takes `--config=NAME` and `--config.a.b=VALUE` out of the arguments."""
    spec, overrides, rest = None, {}, []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        name = name.removeprefix("-").removeprefix("-")
        if not argument.startswith("-") or name.partition(".")[0] != "config":
            rest.append(argument)
            continue
        if not equals:
            value = next(arguments, "")
        if name == "config":
            spec = value
        else:
            overrides[name.removeprefix("config.")] = value
    return spec, overrides, rest


def run(argv: list[str], should_stop: Callable[[], bool] = lambda: False) -> None:
    """Parses the arguments (without the program's name) and does what they say.

    Raises:
        InputError: for anything wrong in the flags, the config, the data or the workdir.
        Interrupted: if `should_stop` said yes.
    """
    spec, overrides, argv = _split(argv)
    if not spec:
        names = ", ".join(sorted(configs.shipped()))
        raise InputError(f"give --config=NAME and --workdir=FOLDER; shipped configs: {names}")
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    flags.DEFINE_enum("mode", "train", MODES, "What to do.", flag_values=values)
    flags.DEFINE_string("topology", None, "A TPU slice.", flag_values=values)
    flags.DEFINE_string("distributed", None, "The processes of the run.", flag_values=values)
    try:
        rest = values(["jaxdistill", *argv])
    except flags.Error as error:
        raise InputError(" ".join(str(error).split())) from error
    if len(rest) > 1:
        raise InputError(f"unexpected argument {rest[1]!r}; every setting is a --flag=value")
    compiling = values.mode == "compile"
    if compiling != bool(values.topology):
        raise InputError("--mode=compile and --topology=NAME, such as v5e:2x4, go together")
    if not values.workdir and not compiling:
        raise InputError("give --workdir=FOLDER; the run and its results go there")
    # This and what follows import JAX: only once the flags are known to be good.
    config = configs.load(spec, overrides)
    if values.mode in ("train", "eval"):
        from jaxdistill import experiment
        from jaxdistill.parallel import processes

        _keep_compiled()
        if values.distributed:
            processes.join(values.distributed)
        action = {"train": experiment.train, "eval": experiment.evaluate}[values.mode]
        action(config, values.workdir, should_stop)
        return
    from jaxdistill.compile import export, plan

    if compiling:
        plan(config, values.topology, values.workdir)
    else:
        export(config, values.workdir)


def _keep_compiled() -> None:
    """Keeps compiled programs from one start to the next, unless JAX is told where already."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        # By host, for a home may be shared by machines that cannot run each other's programs.
        folder = Path.home() / ".cache" / "jaxdistill" / platform.node()
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _on_sigterm() -> Callable[[], bool]:
    """From now on SIGTERM ends nothing; whether it came is told by the function returned."""
    came = threading.Event()

    def handle(*_):
        came.set()
        os.write(sys.stderr.fileno(), b"jaxdistill: SIGTERM, stopping\n")

    signal.signal(signal.SIGTERM, handle)
    return came.is_set


def cli() -> None:
    """Entry point of the `jaxdistill` command."""
    if {"--help", "-h", "--helpfull", "--helpshort"} & set(sys.argv[1:]):
        print(__doc__)
        for name, path in sorted(configs.shipped().items()):
            print(f"--config={name}: {ast.get_docstring(ast.parse(path.read_text()))}")
        return
    try:
        run(sys.argv[1:], _on_sigterm())
    except InputError as error:
        sys.exit(f"jaxdistill: {error}")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(f"jaxdistill: {where}{error.strerror or error}")
    except Interrupted as stop:
        print(f"jaxdistill: {stop}; the same command goes on", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(EXIT_INTERRUPTED)  # the interpreter would wait for what is being computed
    except KeyboardInterrupt:
        sys.exit("jaxdistill: interrupted; the same command goes on from the last checkpoint")


if __name__ == "__main__":
    cli()
