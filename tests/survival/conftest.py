"""What the tests that start the command line share."""

import pytest

from tests.survival import kill


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The outcome of the condensing run of `kill.py` left alone, and where its programs are."""
    scratch = tmp_path_factory.mktemp("undisturbed")
    return kill.undisturbed(scratch, kill.RUNS["condense"]), scratch
