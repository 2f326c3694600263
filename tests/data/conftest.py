"""Real images for all tests of data."""

import pytest

from jaxdistill.data import sources


@pytest.fixture(scope="session")
def digits():
    return sources.load("digits")


@pytest.fixture(scope="session")
def few(digits):
    """The first 40 training and 20 test digits: every class occurs in both."""
    train, test = digits.train, digits.test
    return train.images[:40], train.labels[:40], test.images[:20], test.labels[:20]
