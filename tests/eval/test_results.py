"""Records of measurements and the table made from them."""

import json

import numpy as np
import pytest

from jaxdistill.errors import InputError
from jaxdistill.eval import results
from jaxdistill.eval.results import Cell, Results


def cell(**changes):
    fields = {"evaluation": "accuracy", "row": "ncfm", "metric": "hard", "seed": 0}
    return Cell(**{**fields, "protocol": "abc", **changes})


def test_results_come_back_as_they_were(tmp_path):
    path = tmp_path / "results.json"
    assert results.read(path) == {}
    measured = {
        cell(): {"value": 0.5},
        cell(seed=1): {"value": 0.25, "seconds": 3.0},
        cell(metric="nfe"): {"value": 100},
        cell(metric="KID"): {"value": -0.25},
    }
    results.write(path, measured)
    assert results.read(path) == measured
    results.write(path, {})
    assert results.read(path) == {}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[",
        b"{}",
        b"[1]",
        b"[{}]",
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps([cell()._asdict()]).encode(),
        json.dumps([cell(seed="0")._asdict() | {"value": 0.5}]).encode(),
        json.dumps([cell(seed=True)._asdict() | {"value": 0.5}]).encode(),
        json.dumps([cell(row=3)._asdict() | {"value": 0.5}]).encode(),
        json.dumps([cell()._asdict() | {"value": "0.5"}]).encode(),
        json.dumps([cell()._asdict() | {"value": True}]).encode(),
        json.dumps([cell()._asdict() | {"value": 10**400}]).encode(),
        json.dumps([cell()._asdict() | {"value": float("nan")}]).encode(),
    ],
)
def test_what_is_no_list_of_results_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"results.json is not a list of results .*; delete it"):
        results.read(path)
    assert path.read_bytes() == content


def test_what_is_measured_is_kept_at_once_and_found_again(tmp_path):
    first = Results(tmp_path)
    assert first.missing([cell(), cell(seed=1)]) == [cell(), cell(seed=1)]
    first.keep({cell(): {"value": 0.5, "images": 10}})
    again = Results(tmp_path)
    assert again.missing([cell(), cell(seed=1)]) == [cell(seed=1)]
    assert again.records([cell()]) == [cell()._asdict() | {"value": 0.5, "images": 10}]


def test_what_other_processes_measured_is_gathered(tmp_path):
    results.write(tmp_path / "results.json", {cell(): {"value": 0.5}})
    results.write(tmp_path / "results-1.json", {cell(seed=1): {"value": 0.7}})
    assert set(Results(tmp_path).measured) == {cell(), cell(seed=1)}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_the_table_has_a_row_for_each_row_and_a_column_for_each_metric():
    measured = {
        cell(): 0.5,
        cell(seed=1): 0.7,
        cell(metric="soft"): 0.8,
        cell(row="random"): 0.3,
        cell(row="random", metric="vgg"): 0.2,
    }
    records = [c._asdict() | {"value": value} for c, value in measured.items()]
    lines = [[x.strip() for x in line.split("|")[1:-1]] for line in
             results.table(records, results.percent).splitlines()]  # fmt: skip
    assert lines[0] == ["row", "hard", "soft", "vgg"]
    assert lines[2] == ["ncfm", "60.0 ± 10.0", "80.0 ± 0.0", "–"]
    assert lines[3] == ["random", "30.0 ± 0.0", "–", "20.0 ± 0.0"]
    plain = results.table(records)
    assert "0.6 ± 0.1" in plain and "| 0.8 " in plain


def test_plain_numbers_have_a_spread_only_where_there_are_several():
    assert results.plain([2]) == "2"
    assert results.plain([0.123456]) == "0.1235"
    assert results.plain(list(np.float64([1.0, 3.0]))) == "2 ± 1"


def test_what_an_accuracy_hides_has_a_table():
    known = {"calibration_error": 0.1, "brier": 0.5}
    records = [
        cell()._asdict() | known | {"value": 0.5, "classes": [0.2, 0.8, None]},
        cell(seed=1)._asdict() | known | {"value": 0.5, "classes": [0.4, 0.6, None]},
        # Of learned labels, and of a network that diverged.
        cell(metric="learned")._asdict() | {"value": 0.5, "classes": [0.5, 0.5, None]},
        cell(row="dm")._asdict() | {"value": None, "classes": [0.5, 0.5, None]},
    ]
    lines = [
        [text.strip() for text in line.strip("|").split("|")]
        for line in results.by_class(records, [0]).splitlines()
    ]
    assert lines[0][2:] == [
        "worst class", "best less worst", "rarest third", "calibration error", "Brier score",
    ]  # fmt: skip
    own = ["30.0 ± 10.0", "40.0 ± 20.0", "30.0 ± 10.0", "10.0 ± 0.0", "0.5 ± 0"]
    assert lines[2] == ["ncfm", "hard", *own]
    assert lines[3] == ["ncfm", "learned", *["50.0 ± 0.0", "0.0 ± 0.0"], "50.0 ± 0.0", "–", "–"]
    assert lines[4] == ["dm", "hard", *["diverged"] * 5]
    assert "rarest third" not in results.by_class(records, [])
