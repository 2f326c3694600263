"""The page's tables are those of the record."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = runpy.run_path(str(ROOT / "benchmarks" / "oracle.py"))
    return names, names["recording"].read(names["_RECORD"])


def test_the_page_shows_what_is_recorded(benchmark):
    names, records = benchmark
    page = (ROOT / "docs" / "cross_tokenizer.md").read_text("utf-8")
    for table in ("table", "long_table", "recalibrated_table", "control_table"):
        assert names[table](records).strip() in page
    parts = [[r, r.get("long", {}), r.get("recalibrated", {})] for r in records]
    seconds = sum(part.get("cpu_seconds", 0) for record in parts for part in record)
    assert f"{seconds:.0f} CPU seconds" in page


def test_the_record_has_all_losses_of_all_worlds_and_says_what_the_page_says(benchmark):
    _, records = benchmark
    assert sorted((r["kind"], r["seed"]) for r in records) == [
        *(("control", 0), ("free", 0), ("free", 1), ("space", 0), ("space", 1))
    ]
    passes = ("oracle", "SeqKD", "ALM, whole text", "ALM, two-sided")
    for record in records:
        assert len(record["rows"]) == 19 and record["versions"]["jax"] and record["platform"]
        for row in record["rows"]:
            if record["kind"] != "control":
                stays = row["loss"] in passes
                assert (row["gradient"] < 1e-8) == (row["drift"] < 1e-6) == stays
            assert (row["spelled"] < 1e-8) == (row["loss"] == "oracle")
            assert row["spelled"] > 0.1 or row["loss"] == "oracle"
