"""What every method of every family promises, asked of each module that is there."""

import inspect
import json

import jax
import pytest

from jaxdistill import compile as programs
from jaxdistill import config as configs
from jaxdistill import keywords, settings, stage
from jaxdistill.errors import InputError
from jaxdistill.task import Recipe

SMALL = {
    "condense": "ncfm:dataset=digits,baselines=,smoke",
    "flow": "flow:baselines=,smoke",
    "pairs": "pairs:baselines=,smoke",
    "vlm": "genrecal:baselines=,smoke",
}
METHODS = [
    (family, name)
    for family in settings.modules("jaxdistill.tasks", "ROOM")
    for name in settings.modules(settings.family(family).ROOM, "recipe")
]


def small(family, name):
    """A config in which the method is the only row."""
    return configs.load(SMALL[family].replace("baselines=", f"method={name},baselines="))


def test_every_family_has_methods_here():
    assert {"ncfm", "dm", "random", "herding", "k_center", "start"} <= {n for _, n in METHODS}
    assert {"arcflow", "linear", "endpoint", "progressive", "ucgm"} <= {n for _, n in METHODS}
    assert {"genrecal", "supervised", "across", "dskd", "llava_kd"} <= {n for _, n in METHODS}
    assert {"covariance", "random", "herding", "k_center"} <= {
        name for family, name in METHODS if family == "pairs"
    }
    assert {family for family, _ in METHODS} == set(SMALL)


@pytest.mark.parametrize(("family", "name"), METHODS)
def test_the_signature_is_the_table_of_settings(family, name):
    module = settings.method(name, settings.family(family).ROOM)
    table = keywords.table(module.recipe)
    assert table and all(k.default is not keywords.REQUIRED for k in table.values())
    # Said or not, the defaults are the same, and all are right.
    defaults = keywords.defaults(module.recipe)
    assert keywords.resolve(module.recipe, {}, "method") == keywords.resolve(
        module.recipe, json.loads(json.dumps(defaults)), "method"
    )
    for text in ("Args:", "task:"):
        assert text in inspect.getdoc(module.recipe)
    with pytest.raises(InputError, match=r"unknown setting method\.no_such; choose from"):
        keywords.resolve(module.recipe, {"no_such": 1}, "method")
    for key, keyword in table.items():
        wrong = {bool: 3, str: 3}.get(keyword.kind, "wrong")
        with pytest.raises(InputError, match=rf"method\.{key} is .*; it must be ") as error:
            keywords.resolve(module.recipe, {key: wrong}, "method")
        assert str(error.value).isprintable()


@pytest.mark.parametrize(("family", "name"), METHODS)
def test_it_compiles_and_is_exported_without_data(family, name, tmp_path):
    config = small(family, name)
    resolved = settings.resolve(config)
    task = resolved.family.shapes(resolved)
    recipe = resolved.rows[name].recipe(task)
    assert isinstance(recipe, Recipe) and recipe.steps >= 1
    assert set(recipe.rates) <= set(resolved.rows[name].settings)
    output = stage.output_shapes(recipe, task.examples)
    assert jax.tree.leaves(output)
    programs.export(config, tmp_path, platforms=("tpu",))
    card = json.loads((tmp_path / "artifacts" / "chunk.json").read_text())
    data = (tmp_path / "artifacts" / "chunk_tpu.stablehlo").read_bytes()
    program = jax.export.deserialize(bytearray(data))
    assert [list(x.shape) for x in program.in_avals] == [x["shape"] for x in card["arguments"]]
    assert [list(x.shape) for x in program.out_avals] == [x["shape"] for x in card["results"]]


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(("family", "name"), METHODS)
def test_it_compiles_for_a_slice(tpu, family, name, tmp_path):
    record = programs.plan(small(family, name), "v5e:1x1", tmp_path)
    assert record["fits"]
