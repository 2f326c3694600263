"""A few kills; `kill.py` does as many as one likes."""

import pytest

from tests.survival import kill


@pytest.mark.slow
def test_a_killed_run_ends_in_the_bits_of_an_undisturbed_one(undisturbed):
    wanted, scratch = undisturbed
    run = kill.RUNS["condense"]._replace(targets=("training", "save", "evaluation"))
    record = kill.campaign(wanted, kills=3, seed=1, scratch=scratch, run=run)
    assert record["kills"] == 3
    assert record["bitwise_equal"] == 1
    assert len(record["compared"]) > 5
