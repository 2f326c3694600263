"""Programs compiled for accelerators that this machine does not have, and whether they fit.

The TPU compiler is a library that runs anywhere: given the name of a slice it compiles for it, and
refuses a program that needs more memory than a chip has.
"""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from jaxdistill.errors import InputError
from jaxdistill.parallel.hlo import Cost, walk

# Without these the compiler looks for a TPU on the network, complains that there is none, and
# locks out other processes as if there were one.
_QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_LOG_DIR": "disabled",
}


class _Chip(NamedTuple):
    """A kind of device: bytes that a program can have, and Hz, None where not published."""

    hbm: int
    clock: float | None


_GIB = 2**30
# The bytes are those that the compiler names when it refuses a program, of a core where JAX's
# device is a core (v2, v3). Clocks of v2 to v4: Jouppi et al., ISCA 2021 and 2023; of the others
# the published peak over the additions and multiplications of a cycle.
_CHIPS = {
    "TPU v2": _Chip(int(7.48 * _GIB), 0.7e9),
    "TPU v3": _Chip(int(15.48 * _GIB), 0.94e9),
    "TPU v4": _Chip(int(30.75 * _GIB), 1.05e9),
    "TPU v5 lite": _Chip(int(15.75 * _GIB), 1.5e9),
    "TPU v5": _Chip(int(95.74 * _GIB), 1.75e9),
    "TPU v6 lite": _Chip(int(31.25 * _GIB), 1.75e9),
    "TPU7x": _Chip(int(94.75 * _GIB), None),
}


def quiet() -> None:
    """Prepares this process for `topology_devices`; what the user has set stays.

    To be called before JAX starts its backend: with the TPU compiler there, JAX would look for
    a TPU of its own.
    """
    if jax.config.jax_platforms is None:
        jax.config.update("jax_platforms", "cpu")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def topology_devices(name: str, num_slices: int = 1) -> list[jax.Device]:
    """The devices of a TPU slice, to compile for.

    Args:
        name: Such as `v5e:16x16`, `v5e:1x1` or `v4:2x2x2`: any that JAX's topologies know.
        num_slices: How many such slices.

    Raises:
        InputError: If the TPU compiler is not installed, or does not know the name.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("the TPU compiler is missing; pip install 'jaxdistill[tpu]'")
    options: dict[str, Any] = {} if num_slices == 1 else {"num_slices": num_slices}
    sides = name.rpartition(":")[2].split("x")
    if all(side == "1" for side in sides):
        # A host has four chips or more unless told otherwise.
        options["chips_per_host_bounds"] = (1, 1, 1)
    if name.startswith("v4:"):
        # As JAX runs it there: the two cores of a chip are one device.
        options["chip_config_name"] = "megacore"
    try:
        return list(topologies.get_topology_desc(name, "tpu", **options).devices)
    except Exception as error:  # of several kinds, by what is wrong
        first = str(error).partition("\n")[0]
        raise InputError(
            f"no TPU topology {name!r} ({first}); examples: v5e:2x4, v5e:16x16, v4:2x2x2, v6e:4x4"
        ) from error


def memory_of(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that a program can have on each of some devices of one kind; None where unknown."""
    chip = _CHIPS.get(devices[0].device_kind)
    return chip and chip.hbm


class Report(NamedTuple):
    """A program on a slice; all but `devices` is of one device.

    Attributes:
        devices: How many.
        kind: The kind of the devices.
        arguments: Bytes of arguments.
        temporaries: Bytes of intermediate results.
        output: Bytes of results.
        aliased: Bytes of results that take the place of donated arguments.
        code: Bytes of the program.
        peak: Bytes at most in use.
        hbm: Bytes that the device has, None where it is not known.
        fits: Whether the compiler accepts it, and `peak` is no more than `hbm`: it has accepted
            programs whose arrays, by its own sizes, are more than that.
        refusal: What it said if not, or by how much it is too large.
        cost: The cost of one run of the program, in which loops of unknown length count once.
        seconds: The compiler's estimate of the time of its kernels, None where it makes none. It
            is no measurement. The `optimal_seconds` of JAX's `cost_analysis` are not used: of a
            program with loops they may even be negative.
    """

    devices: int
    kind: str
    arguments: int = 0
    temporaries: int = 0
    output: int = 0
    aliased: int = 0
    code: int = 0
    peak: int = 0
    hbm: int | None = None
    fits: bool = True
    refusal: str = ""
    cost: Cost = Cost()
    seconds: float | None = None


def report(lowered: jax.stages.Lowered, devices: Sequence[jax.Device]) -> Report:
    """Compiles for the devices that the program was lowered for, and says what came out."""
    kind = devices[0].device_kind
    chip = _CHIPS.get(kind)
    known = Report(len(devices), kind, hbm=chip and chip.hbm)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return known._replace(fits=False, refusal=_refusal(str(error)))
    memory, cost = compiled.memory_analysis(), walk(compiled.as_text())
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "output": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    peak = sum(sizes.values()) - 2 * sizes["aliased"]
    over = peak - chip.hbm if chip else 0
    if over > 0:
        said = f"{peak / 1e9:.2f} GB are needed, {over / 1e9:.2f} more than there are"
        known = known._replace(fits=False, refusal=said)
    seconds = cost.cycles / chip.clock if chip and chip.clock and cost.cycles else None
    return known._replace(**sizes, peak=peak, cost=cost, seconds=seconds)


def _refusal(message: str) -> str:
    """The line that has the numbers."""
    first = message.partition("\n")[0]
    return first.rpartition("RESOURCE_EXHAUSTED: ")[2]
