"""The command line: flags to config to run. The only module with flags.

    jaxdistill --config=ncfm:dataset=digits,ipc=1 --workdir=runs/digits
    jaxdistill --config=ncfm:dataset=digits,ipc=1 --workdir=runs/digits --mode=eval
"""

import sys

from absl import flags
from ml_collections import config_flags

from jaxdistill import config as configs
from jaxdistill.errors import InputError


def _define(values: flags.FlagValues) -> None:
    config_flags.DEFINE_config_file(
        "config",
        help_string="A shipped config or a path, `name[:argument]`; `--config.a.b=…` overrides.",
        lock_config=True,
        flag_values=values,
    )
    flags.DEFINE_string(
        "workdir", None, "Folder of the run; made if missing.", flag_values=values
    )
    flags.DEFINE_enum(
        "mode",
        "train",
        ["train", "eval"],
        "train: distil, then evaluate. eval: evaluate the artefact in the workdir again.",
        flag_values=values,
    )


def _resolve(argument: str) -> str:
    name, equals, spec = argument.partition("=")
    return f"{name}={configs.resolve(spec)}" if name in ("--config", "-config") else argument


def run(argv: list[str]) -> None:
    """Parses the flags in `argv` (without the program's name) and does what they say.

    Raises:
        InputError: for anything wrong in the flags, the config, the data or the workdir.
    """
    values = flags.FlagValues()
    _define(values)
    try:
        rest = values(["jaxdistill", *map(_resolve, argv)])
    except InputError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(" ".join(str(error).split())) from error
    if len(rest) > 1:
        raise InputError(f"unexpected argument {rest[1]!r}; every setting is a --flag=value")
    if values.config is None or values.workdir is None:
        raise InputError("give --config=NAME and --workdir=FOLDER; shipped configs: "
                         + ", ".join(sorted(configs.shipped())))
    from jaxdistill import train  # imports JAX: only once the flags are known to be good

    action = {"train": train.train, "eval": train.evaluate}[values.mode]
    action(values.config, values.workdir)


def cli() -> None:
    """Entry point of the `jaxdistill` command."""
    if any(a in ("--help", "-h", "--helpshort", "--helpfull") for a in sys.argv[1:]):
        values = flags.FlagValues()
        _define(values)
        print(__doc__, values.main_module_help() or values.get_help(), sep="\n")
        return
    try:
        run(sys.argv[1:])
    except InputError as error:
        sys.exit(f"jaxdistill: {error}")
    except KeyboardInterrupt:
        sys.exit("jaxdistill: interrupted; the same command goes on from the last checkpoint")


if __name__ == "__main__":
    cli()
