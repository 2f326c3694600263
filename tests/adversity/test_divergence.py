"""What diverged says so: in its row, and by the exit code."""

import json
import typing
from unittest import mock

import numpy as np
import pytest

from jaxdistill import keywords, load_distilled, main, settings
from jaxdistill.errors import Diverged, InputError
from jaxdistill.eval import results
from jaxdistill.io import weights
from tests.adversity.conftest import CONDENSE, FLOW

# Another JAX says the same.
pytestmark = pytest.mark.slow


def _tables():
    """Every group of settings, method and evaluation, with its table."""
    for name in settings.modules("jaxdistill.tasks", "ROOM"):
        family = settings.family(name)
        for group, made in settings.tables(family).items():
            yield f"{name}: {group}", made
        for method in settings.modules(family.ROOM, "recipe"):
            yield f"{name}: method {method}", settings.method(method, family.ROOM).recipe
    for name in settings.modules("jaxdistill.eval", "evaluate"):
        yield f"evals {name}", settings.evaluation(name).evaluate


@pytest.mark.parametrize(
    ("name", "function"), [*_tables()], ids=lambda x: x if type(x) is str else ""
)
def test_every_number_has_a_range(name, function):
    del name
    for setting, keyword in keywords.table(function).items():
        inner = typing.get_args(keyword.kind) if type(keyword.kind) is not type else ()
        if {keyword.kind, *inner} & {int, float}:
            assert keyword.between is not None, setting
            for value in (float("inf"), float("-inf"), float("nan")):
                given = (value,) if inner else value
                with pytest.raises(InputError):
                    keywords.check(setting, keyword, given)


def test_networks_that_diverge_are_a_row_that_says_so(copied, capsys):
    flags, workdir = copied
    if flags is FLOW:
        pytest.skip("students are measured by what they make")
    flags = [*flags, "--mode=eval", f"--workdir={workdir}"]
    slow = "--config.evals.accuracy.learning_rate=1000"
    for _ in range(2):  # the same command says the same
        with pytest.raises(Diverged, match=r"measurements diverged \(accuracy of ncfm, accuracy"):
            main.run([*flags, slow])
        table = capsys.readouterr().out
        # Once in the table of accuracies and in each column of that by class.
        assert table.count("diverged") == 3 * (1 + 4) and "±" not in table.split("\n", 1)[1]
    records = json.loads((workdir / "results.json").read_text())
    assert sum(record["value"] is None for record in records) == 6
    assert load_distilled(workdir).card["accuracies"] == []
    main.run(flags)
    assert "±" in capsys.readouterr().out
    assert len(load_distilled(workdir).card["accuracies"]) == 2


def test_a_row_is_not_flattered_by_those_that_are_left():
    record = {"row": "a", "metric": "m"}
    values = [0.5, None, 0.7]
    table = results.table([record | {"value": v} for v in values], results.percent)
    assert "1 of 3 diverged" in table and "60" not in table


def test_extractors_that_diverge_are_not_kept(tmp_path):
    flags = [*CONDENSE, f"--workdir={tmp_path / 'run'}", f"--config.pool.dir={tmp_path / 'pool'}"]
    with pytest.raises(Diverged, match="diverged in its training and is not kept"):
        main.run([*flags, "--config.pool.learning_rate=1000", "--config.pool.epochs=3"])
    assert not list((tmp_path / "pool").iterdir())


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_parameters_that_are_not_finite_are_found_where_they_are_read(which, copied):
    flags, workdir = copied
    if flags is not FLOW:
        pytest.skip("images are checked as arrays")
    folder = workdir / {"teacher": "teacher", "student": "artifacts"}[which]
    params, card = weights.load(folder, which)
    leaf = next(iter(params.values()))
    while isinstance(leaf, dict):
        parent, leaf = leaf, next(iter(leaf.values()))
    broken = np.array(leaf)
    broken.flat[0] = np.nan
    parent[next(iter(parent))] = broken
    with pytest.raises(Diverged, match=r"is not finite, so .* does not get it"):
        weights.save(folder, which, params, card)
    # As another program may write it.
    with mock.patch.object(weights, "_is_finite", lambda x: True):
        weights.save(folder, which, params, card)
    with pytest.raises(InputError, match=rf"{which}\.safetensors cannot be used \(.*not finite"):
        main.run([*flags, f"--workdir={workdir}"])
