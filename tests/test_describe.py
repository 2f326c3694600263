"""What is said of what there is: every name, every setting, and nothing that is declared twice."""

import pytest

from jaxdistill import config as configs
from jaxdistill import describe, keywords, main, settings
from jaxdistill.errors import InputError

FAMILIES = settings.modules(settings.FAMILIES, "ROOM")
METHODS = [
    settings.method(name, room).recipe
    for room in (settings.family(f).ROOM for f in FAMILIES)
    for name in settings.modules(room, "recipe")
]
EVALUATIONS = [
    settings.evaluation(name).evaluate for name in settings.modules(settings.EVALS, "evaluate")
]
GROUPS = [group for f in FAMILIES for group in settings.tables(settings.family(f)).values()]


@pytest.mark.parametrize(
    "table",
    dict.fromkeys([*METHODS, *EVALUATIONS, *GROUPS]),
    ids=lambda f: f"{f.__module__}.{f.__name__}",
)
def test_every_setting_has_a_meaning(table):
    meant = describe.meanings(table)
    assert set(meant) == set(keywords.table(table))
    for text in meant.values():
        assert len(text) > 3 and text.rstrip().endswith((".", ")"))


def test_a_list_has_every_name(capsys):
    main.run(["list"])
    said = capsys.readouterr().out
    for name in [*configs.shipped(), *settings.modules(settings.EVALS, "evaluate")]:
        assert f"  {name} " in said
    for family in FAMILIES:
        for name in settings.modules(settings.family(family).ROOM, "recipe"):
            assert f"  {name} " in said


@pytest.mark.parametrize("name", configs.shipped())
def test_a_config_is_described_with_its_values(name):
    config = configs.load(name)
    said = describe.described(name)
    assert f"--config={name}" in said
    for group in settings.tables(settings.family(config.family)):
        assert f"\nconfig.{group}\n" in said
    assert f"\nconfig.method: {config.method.name}\n" in said
    for row in config.baselines:
        assert f"\nconfig.baselines.{row}: " in said
    for key, value in config.method.items():
        if key != "name":
            assert f"\n  {key} = {value}\n" in said


def test_an_argument_changes_what_is_said():
    assert "\n  ipc = 7\n" in describe.described("ncfm:ipc=7")
    assert "\n  ipc = 1\n" in describe.described("ncfm")


def test_methods_and_evaluations_are_described_by_their_docstrings():
    said = describe.described("herding")
    assert said.startswith("method herding of the family condense")
    assert "  ipc = 1\n      a whole number" in said
    # Settings that several methods share stand in the table of each.
    shared = describe.described("arcflow")
    assert "  rank = 0\n" in shared and "  warmup = 100\n" in shared
    assert "evaluation classify" in describe.described("classify")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["describe", "herdign"], "nothing is called 'herdign'; did you mean herding"),
        (["describe", "qqqqqq"], "nothing is called 'qqqqqq'; see jaxdistill list"),
        (["describe"], "jaxdistill describe NAME"),
        (["list", "ncfm"], "jaxdistill list"),
        (["--config=ncfm:smoke", "--workdir=x", "--mode=eval", "--dry_run"], "--dry_run says what"),
    ],
)
def test_what_cannot_be_said_is_one_line(arguments, said):
    with pytest.raises(InputError) as error:
        main.run(arguments)
    assert said in str(error.value) and "\n" not in str(error.value)
