"""A few kills; `kill.py` does as many as one likes."""

import pytest

from tests.survival import kill


@pytest.mark.slow
def test_a_killed_run_ends_in_the_bits_of_an_undisturbed_one(tmp_path):
    targets = ("training", "save", "evaluation")
    record = kill.campaign(kills=3, seed=1, scratch=tmp_path, targets=targets)
    assert record["kills"] == 3
    assert record["bitwise_equal"] == 1
    assert len(record["compared"]) > 5
