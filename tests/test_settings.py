"""Rows of their own: identities compared one by one, whatever settings came or changed since."""

import json

import pytest

from jaxdistill import config as configs
from jaxdistill import keywords, run_folder, settings
from jaxdistill.errors import InputError

SMOKE = "ncfm:dataset=digits,smoke"


@pytest.fixture
def begun(tmp_path):
    """A row as it was begun, its identity and its defaults."""
    experiment = settings.resolve(configs.load(SMOKE))
    row = experiment.rows["ncfm"]
    identity, defaults = experiment.identity(row), experiment.default_identity(row)
    run_folder.claim(tmp_path, identity, defaults)
    return tmp_path, identity, defaults


def forget(folder, **groups):
    """Takes settings out of the stored row, as if they had not been there yet."""
    stored = json.loads((folder / "row.json").read_text())
    for group, names in groups.items():
        for name in names:
            del stored[group][name]
    (folder / "row.json").write_text(json.dumps(stored))


def test_a_setting_that_came_later_leaves_an_older_row_valid(begun):
    folder, identity, defaults = begun
    before = run_folder.claim(folder, identity, defaults)
    forget(folder, method=["warmup", "alpha"], data=["holdout_per_class"])
    # Checkpoints and artefacts know the row by what is stored, which is left as it is.
    stored = (folder / "row.json").read_text()
    assert run_folder.claim(folder, identity, defaults) != before
    assert (folder / "row.json").read_text() == stored


def test_a_setting_that_came_later_shows_where_it_is_not_its_default(begun):
    folder, identity, defaults = begun
    forget(folder, method=["warmup"])
    changed = json.loads(json.dumps(identity))
    changed["method"]["warmup"] = 7
    with pytest.raises(InputError, match=r"another config \(method\.warmup=100, now 7\)"):
        run_folder.compare(folder, changed, defaults)


def test_a_default_that_has_changed_shows(begun):
    folder, identity, defaults = begun
    changed = json.loads(json.dumps(identity))
    changed["method"]["alpha"] = 0.25  # as a later version might resolve it
    with pytest.raises(InputError, match=r"method\.alpha=0\.5, now 0\.25"):
        run_folder.compare(folder, changed, defaults)


def test_a_setting_that_is_no_more_shows(begun):
    folder, identity, defaults = begun
    changed = json.loads(json.dumps(identity))
    del changed["method"]["alpha"], defaults["method"]["alpha"]
    with pytest.raises(InputError, match=r"method\.alpha=0\.5, now None"):
        run_folder.compare(folder, changed, defaults)


def test_ways_and_places_identify_nothing_and_other_rows_neither():
    def identity(spec, **overrides):
        experiment = settings.resolve(
            configs.load(spec, {k.replace("__", "."): v for k, v in overrides.items()})
        )
        return experiment.identity(experiment.rows["ncfm"])

    plain = identity(SMOKE)
    same = {"run__chunk": "7", "pool__dir": "/x", "data__placement": "streamed"}
    same |= {"data__data_dir": "/y"}
    assert identity(SMOKE, **same, parallel__backend="pmap") == plain
    assert identity(f"{SMOKE},baselines=dm") == plain
    assert identity(SMOKE, evals__accuracy__seeds="9") == plain
    for name, value in {"seed": "3", "method__steps": "9", "pool__epochs": "2"}.items():
        assert identity(SMOKE, **{name: value}) != plain


def test_every_setting_of_a_row_is_stored(begun):
    folder, _, _ = begun
    stored = json.loads((folder / "row.json").read_text())
    experiment = settings.resolve(configs.load(SMOKE))
    assert set(stored["method"]) == {"name", *experiment.rows["ncfm"].settings}
    again = settings.resolve(experiment.stated())
    assert again.identity(again.rows["ncfm"]) == stored


def test_a_workdir_of_an_older_version_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"method": {"name": "ncfm"}, "eval": {}}')
    with pytest.raises(InputError, match=r"made by a version before 0\.2.*use another workdir"):
        run_folder.check(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "does not say its family; set config.family to condense or flow"),
        ({"family": "magic"}, "unknown family 'magic'; choose from condense, flow"),
        ({"family": "condense", "methods": {}}, "unknown setting methods; choose from method"),
        ({"family": "condense", "data": 3}, "config.data is 3; it is a group, a dict"),
        ({"family": "condense", "data": {}}, "data.name is missing; it must be a text"),
        ({"shift": 1.0}, "setting shift is now called path.shift"),
        ({"method": {"name": "synthetic"}}, "choose from dm, gradient, herding"),
        ({"method": {"name": "os"}}, "unknown method 'os'"),
        ({"method": {"name": "no.such"}}, "unknown method 'no.such'"),
        ({"method": {"ipc": 1}}, "method has no name"),
        ({"method": {"name": "random", "rate": 1}}, "method.rate is now called method.learning_"),
        ({"baselines": {"../x": {"name": "random"}}}, "for it is the name of a folder"),
        ({"baselines": {"random": {"name": "dm"}}}, "as the method is called; rename it"),
        ({"baselines": {"a": {"name": "dm", "ipc": 0}}}, "baselines.a.ipc is 0; it must be"),
        ({"evals": {"a": {"name": "magic"}}}, "unknown evaluation 'magic'; choose from answers"),
        ({"evals": {"a": {"name": "points"}}}, "points measures runs of the family flow, and this"),
        ({"evals": {"a": {"name": "classify", "rate": 1}}}, "evals.accuracy.learning_rate"),
    ],
)
def test_configs_that_are_wrong_are_told_in_one_line(config, message):
    right = {"family": "condense", "data": {"name": "digits"}, "method": {"name": "random"}}
    with pytest.raises(InputError) as error:
        settings.resolve((right if config and "family" not in config else {}) | config)
    assert message in str(error.value) and str(error.value).isprintable()


def test_keywords_of_every_kind():
    def function(task, *, a: keywords.Count = 1, b: tuple[str, ...] = (), c: float | None = None):
        """Takes settings."""

    table = keywords.table(function)
    assert list(table) == ["a", "b", "c"]
    resolved = keywords.resolve(function, {"b": ["x"], "c": 2}, "group")
    assert resolved == {"a": 1, "b": ("x",), "c": 2.0} and type(resolved["c"]) is float
    for given in ({"a": True}, {"a": 1.0}, {"a": None}, {"b": "x"}, {"b": (1,)}, {"c": "x"}):
        (name,) = given
        with pytest.raises(InputError, match=rf"group\.{name} is .*; it must be "):
            keywords.resolve(function, given, "group")
