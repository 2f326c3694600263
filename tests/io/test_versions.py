"""Versions in records."""

import os
import sys

import numpy as np

from jaxdistill.io.versions import versions


def test_versions_name_what_is_installed():
    found = versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["numpy"] == np.__version__
    model, threads = found["processor"].rsplit(", ", 1)
    assert model and threads == f"{os.cpu_count()} threads"
    assert {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint"} <= set(found)
