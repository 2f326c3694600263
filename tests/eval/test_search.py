"""Rankings of networks: what is said of two of them, and spaces that have none."""

import numpy as np
import pytest
from scipy import stats

import jaxdistill
from jaxdistill.errors import InputError
from jaxdistill.eval import search


def test_the_space_is_every_combination_once():
    shapes = search.space((8, 16, 8), (1, 2), ("none",), ("relu", "sigmoid"), ("avg",))
    assert len(shapes) == len(set(shapes)) == 8
    assert str(shapes[0]) == "8x1 none relu avg"
    assert len({str(shape) for shape in shapes}) == 8


def test_rankings_are_compared_as_scipy_does():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=20).round(1)  # with ties
    proxy = (reference + rng.normal(size=20)).round(1)
    found = search.agreement(proxy, reference)
    assert found["spearman"] == pytest.approx(stats.spearmanr(proxy, reference).statistic)
    assert found["kendall"] == pytest.approx(stats.kendalltau(proxy, reference).statistic)
    best = np.argsort(-proxy, kind="stable")[:4]
    expected = stats.spearmanr(proxy[best], reference[best]).statistic
    assert found["spearman, best fifth"] == pytest.approx(expected)
    assert found["first"] == reference[proxy.argmax()]
    assert found["regret"] == pytest.approx(reference.max() - found["first"])
    assert found["from"] < found["spearman"] < found["to"]
    assert search.agreement(reference, reference)["spearman"] == pytest.approx(1)
    assert search.agreement(-reference, reference)["spearman"] == pytest.approx(-1)


def test_the_interval_covers_what_there_is():
    """Of two rankings with a correlation of 0.6 the interval holds it in most of the draws."""
    rng, inside = np.random.default_rng(1), 0
    for _ in range(40):
        a = rng.normal(size=72)
        b = 0.6 * a + 0.8 * rng.normal(size=72)
        found = search.agreement(a, b)
        inside += found["from"] <= 0.582 <= found["to"]  # Spearman's of a Pearson's of 0.6
    assert inside >= 34


def test_a_constant_ranking_has_no_correlation_but_a_first():
    found = search.agreement(np.zeros(5), np.arange(5.0))
    assert set(found) == {"first", "regret"}
    assert (found["first"], found["regret"]) == (0.0, 4.0)


def records():
    values = {
        "dm": [[0.5, 0.7], [0.1, 0.1], [0.9, 0.5]],
        "real images": [[0.5, 0.6], [0.7, 0.8], [0.9, 0.9]],
    }
    return [
        {
            "evaluation": "s",
            "row": row,
            "metric": f"net {i}",
            "seed": seed,
            "value": values[row][i][seed],
            "cpu_seconds": 2.0,
        }
        for i in range(3)
        for row in values
        for seed in range(2)
    ]


def test_rows_are_compared_with_the_mean_of_the_real_images():
    names = {f"net {i}": 10 - i for i in range(3)}
    found = {(r["row"], r["metric"]): r["value"] for r in search.summaries(records(), names)}
    assert found["dm", "spearman"] == pytest.approx(0.5)
    assert found["dm", "first"] == pytest.approx(0.9)
    assert found["dm", "CPU s"] == 12.0
    assert found["number of parameters", "spearman"] == pytest.approx(-1)
    # One training on real images against the other: what is to be reached.
    assert found["real images", "spearman"] == pytest.approx(1)
    assert found["real images", "first"] == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"widths": "()"}, "a space of 0 networks has no order"),
        ({"widths": "(4, 4)"}, "a space of 1 networks has no order"),
        ({"depths": "(1, 2, 3, 9)"}, "maps of one pixel|one pixel"),
        ({"norms": "('none', 'fancy')"}, "norms"),
    ],
)
def test_a_space_with_nothing_in_it_is_refused(overrides, said, tmp_path):
    named = {f"evals.search.{key}": value for key, value in overrides.items()}
    if "depths" in overrides:
        named["evals.search.norms"] = "('instance',)"
    with pytest.raises(InputError, match=said):
        jaxdistill.train(jaxdistill.load_config("search:smoke", named), tmp_path / "run")
    assert not (tmp_path / "run" / "artifacts").exists()
