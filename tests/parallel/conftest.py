"""The compiler for TPUs, where it is installed."""

import pytest

from jaxdistill.parallel import topology


@pytest.fixture(scope="module")
def tpu():
    pytest.importorskip("libtpu")
    topology.quiet()
