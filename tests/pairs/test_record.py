"""The page's tables are those of the records."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["pairs", "pairs_digits"])
def test_the_page_shows_what_is_recorded(monkeypatch, name):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = runpy.run_path(str(ROOT / "benchmarks" / "pairs.py"))
    records = names["recording"].read(names["recording"].FOLDER / f"{name}.json")
    page = (ROOT / "docs" / "pairs.md").read_text("utf-8")
    assert records
    for pairs in {record["pairs"] for record in records}:
        head, _, rows = names["table"](records, pairs).strip().partition("\n\n")
        assert head in page and rows in page
