"""The command line: flags to config to run. The only module with flags.

    jaxdistill --config=NAME[:ARGUMENT] --workdir=FOLDER [--mode=MODE] [--config.KEY=VALUE …]
jaxdistill list
jaxdistill describe NAME[:ARGUMENT]
jaxdistill completion SHELL

list        configs, methods and evaluations, a line each
describe    what one of them does, and everything that can be set in it
completion  a script by which bash, zsh or fish complete all of these names and settings

--config    a shipped config or the path of one, with its argument string, or the config.json that
            a run has left; any setting in it can be overridden by --config.a.b=value
--workdir   where everything goes; the same command goes on with an interrupted run
--mode      train distils and evaluates, eval evaluates the artefact in the workdir again;
            compile says what the run costs on a TPU slice, with neither the slice nor the data;
            fit finds settings with which it fits the slice, or, of a kind of chip such as v5e, the
            smallest slice that it fits; export writes its program as StableHLO; verify, without
            --config, checks that what the workdir holds is what its cards say, of the data and the
            settings that they name; convert, without --config, writes the distilled set of the
            workdir for other libraries
--dry_run   checks all that training would, and says what it would do and what a step costs here;
            nothing is made
--out       what convert makes: imagefolder:FOLDER, webdataset:FOLDER or parquet:FOLDER
--topology  the slice to compile for or to fit, such as v5e:16x16; the workdir is then optional
--distributed  for several processes: auto on SLURM and TPU pods, else HOST:PORT,PROCESSES,INDEX;
            the workdir must be one that all of them reach
"""

import ast
import contextlib
import os
import platform
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from jaxdistill.errors import InputError, Interrupted

EXIT_INTERRUPTED = 75
"""Exit code after SIGTERM: what was done is kept, and the same command goes on. It is EX_TEMPFAIL
of sysexits.h; docs/running.md lists the other codes."""

EXIT_CTRL_C = 130
"""Exit code after Ctrl-C, as shells have it."""

MODES = ("train", "eval", "compile", "fit", "export", "verify", "convert")


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


def _flags():
    """The flags that are no settings."""
    from absl import flags

    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    flags.DEFINE_enum("mode", "train", MODES, "What to do.", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "Whether only to look.", flag_values=values)
    flags.DEFINE_string("out", None, "A form and a folder.", flag_values=values)
    flags.DEFINE_string("topology", None, "A TPU slice.", flag_values=values)
    flags.DEFINE_string("distributed", None, "The processes of the run.", flag_values=values)
    return values


def run(argv: list[str], should_stop: Callable[[], bool] = lambda: False) -> None:
    """Parses the arguments (without the program's name) and does what they say.

    Raises:
        InputError: for anything wrong in the flags, the config, the data or the workdir.
        Interrupted: if `should_stop` said yes.
    """
    # Imports stand where they are needed: an interrupt or a wrong flag waits for none of them.
    from absl import flags

    from jaxdistill import config as configs

    if argv and argv[0] in ("list", "describe", "completion"):
        print(_told(argv))
        return
    spec, overrides, argv = _split(argv)
    values = _flags()
    try:
        rest = values(["jaxdistill", *argv])
    except flags.Error as error:
        raise InputError(" ".join(str(error).split())) from error
    if len(rest) > 1:
        raise InputError(f"unexpected argument {rest[1]!r}; every setting is a --flag=value")
    if values.mode == "convert":
        form, _, out = (values.out or "").partition(":")
        if spec or overrides or values.topology or values.dry_run or not (values.workdir and out):
            raise InputError(
                "write --mode=convert --workdir=FOLDER --out=FORM:FOLDER and nothing else"
            )
        from jaxdistill.io import exports

        exports.export(values.workdir, out, form)
        print(f"{form} in {out}")
        return
    if values.out:
        raise InputError("--out=FORM:FOLDER goes with --mode=convert")
    if values.mode == "verify":
        if spec or overrides or values.topology or not values.workdir:
            raise InputError("write --mode=verify --workdir=FOLDER and nothing else")
        from jaxdistill import look

        print(look.verify(values.workdir))
        return
    if not spec:
        names = ", ".join(sorted(configs.shipped()))
        raise InputError(f"give --config=NAME and --workdir=FOLDER; shipped configs: {names}")
    compiling = values.mode in ("compile", "fit")
    if compiling != bool(values.topology):
        raise InputError(
            "--mode=compile or --mode=fit, and --topology=NAME, such as v5e:2x4, go together"
        )
    if not values.workdir and not compiling:
        raise InputError("give --workdir=FOLDER; the run and its results go there")
    if values.dry_run and values.mode != "train":
        raise InputError("--dry_run says what --mode=train would do; leave one of them out")
    config = configs.load(spec, overrides)
    from jaxdistill.parallel import processes

    if values.distributed:
        processes.join(values.distributed)
    processes.check_devices()
    if values.mode in ("train", "eval"):
        from jaxdistill import experiment

        _keep_compiled()
        if values.dry_run:
            from jaxdistill import look
            from jaxdistill.compile import plan

            print(look.preview(config, values.workdir))
            print("\nOf the first row, a step and what is around it:")
            plan(config.get("generator") or config, None)
            return
        action = {"train": experiment.train, "eval": experiment.evaluate}[values.mode]
        action(config, values.workdir, should_stop)
        return
    from jaxdistill.compile import export, plan

    if values.mode == "fit":
        from jaxdistill.fit import fit

        fit(config, values.topology, values.workdir, should_stop=should_stop)
    elif values.mode == "compile":
        plan(config, values.topology, values.workdir)
    else:
        export(config, values.workdir)


def _told(argv: list[str]) -> str:
    """What `list`, `describe` and `completion` print.

    Raises:
        InputError: If it is not said, or not known, what should be described.
    """
    from jaxdistill import describe

    if argv == ["list"]:
        return describe.listed()
    if argv[0] == "list" or len(argv) != 2:
        raise InputError(
            "write jaxdistill list, jaxdistill describe NAME, or jaxdistill completion SHELL, and "
            "nothing behind it"
        )
    if argv[0] == "completion":
        from jaxdistill import completion

        return completion.script(argv[1], _flags())
    return describe.described(argv[1])


def _keep_compiled() -> None:
    """Keeps compiled programs from one start to the next, unless JAX is told where already."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        # By host, for a home may be shared by machines that cannot run each other's programs.
        try:
            folder = Path.home() / ".cache" / "jaxdistill" / platform.node()
        except RuntimeError:  # a user without a home
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _on_sigterm() -> Callable[[], bool]:
    """From now on SIGTERM ends nothing; whether it came is told by the function returned."""
    came = threading.Event()

    def handle(*_):
        came.set()
        os.write(sys.stderr.fileno(), b"jaxdistill: SIGTERM, stopping\n")

    signal.signal(signal.SIGTERM, handle)
    return came.is_set


def _on_sigint() -> None:
    """From now on Ctrl-C ends the process at once, with one line.

    As an exception it would have to get through imports and compilers, which answer it with errors
    of their own. What is on disk is whole at any moment.
    """

    def handle(*_):
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os.write(2, b"\njaxdistill: interrupted; the same command goes on\n")
        os._exit(EXIT_CTRL_C)

    signal.signal(signal.SIGINT, handle)


def cli() -> None:
    """Entry point of the `jaxdistill` command."""
    _on_sigint()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")  # tables have letters that not every terminal has
    warnings.formatwarning = lambda message, *_, **__: f"jaxdistill: {message}\n"
    if {"--help", "-h", "--helpfull", "--helpshort"} & set(sys.argv[1:]):
        print(__doc__)
        from jaxdistill import config as configs

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


if __name__ == "__main__":
    cli()
