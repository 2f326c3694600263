"""Eight devices on any machine, so that sharded programs are always exercised.

Programs are compiled once a session, as they are once a machine for the command line: most of the
time would go into compiling the same ones again, by other tests and by the processes they start.
"""

import atexit
import importlib.metadata
import os
import re
import shutil
import sys
import tempfile

import pytest

# All are read when jax starts its backend. The thread pool must be larger than the number of
# devices: on few cores their collectives otherwise wait for each other for ever.
os.environ.setdefault("NPROC", "64")
# Programs are large and run for milliseconds, here and in the processes that tests start.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
_flags = ["--xla_force_host_platform_device_count=8", "--xla_cpu_parallel_codegen_split_count=1"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones have no other way
    _flags.append("--xla_cpu_use_fusion_emitters=false")  # which take two thirds of compilation
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_flags]).strip()

if "PYTEST_XDIST_WORKER" not in os.environ:  # else the folder is that of all workers
    _programs = tempfile.mkdtemp(prefix="jaxdistill-programs-")
    atexit.register(shutil.rmtree, _programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
# Small ones cost less to compile again than to keep.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def flags_for(devices: int) -> str:
    """XLA_FLAGS of a process that is to have some devices."""
    return re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """Programs are let go after each module.

    Each takes some of the 65,530 memory maps that Linux gives a process, and where there are none
    left XLA ends it.
    """
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture(scope="session")
def tpu():
    """The compiler for TPUs, where it is installed."""
    pytest.importorskip("libtpu")
    from jaxdistill.parallel import topology  # only now that the environment is set

    topology.quiet()
