"""Which programs are configs, and what a flag may set."""

import functools
import json

import pytest

from jaxdistill import config as configs
from jaxdistill import describe, settings
from jaxdistill.errors import InputError

PROGRAMS = {
    "is not a Python program": "def get_config(:",
    "is not a Python program: ": "x = '\0'",
    "defines no get_config": "x = 1",
    "returns dict, not a ConfigDict": "def get_config(argument):\n    return {}",
}


@pytest.mark.parametrize("message", PROGRAMS)
def test_programs_that_are_no_configs(tmp_path, message):
    path = tmp_path / "mine.py"
    path.write_text(PROGRAMS[message])
    with pytest.raises(InputError, match=message) as error:
        configs.load(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["README.md", "a" * 300, "a\0b", "", ".", "/dev/null", "x\ny"])
def test_what_is_no_program_is_not_run(name):
    with pytest.raises(InputError, match=r"no config '.*': give a path to a \.py file") as error:
        configs.load(name)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_a_slip_of_the_keyboard_gets_the_name_that_was_meant():
    with pytest.raises(InputError, match=r"no config 'gradeint': .* did you mean gradient\?$"):
        configs.load("gradeint")


def test_a_config_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import ml_collections\n"
        "def get_config(argument):\n"
        "    method = {'name': 'random', 'ipc': int(argument or 1)}\n"
        "    given = {'family': 'condense', 'data': {'name': 'digits'}, 'method': method}\n"
        "    return ml_collections.ConfigDict(given)\n"
    )
    assert configs.resolve(f"{path}:a:b=c") == f"{path}:a:b=c"
    assert configs.load(f"{path}:3").method.ipc == 3
    config = configs.load(str(path))
    assert config.method.ipc == 1
    assert (config.run.chunk, config.pool.size, config.data.placement) == (10, 4, "resident")


@pytest.mark.parametrize("name", sorted(configs.shipped()))
def test_what_a_run_writes_of_its_config_is_that_config(name, tmp_path):
    stated = settings.resolve(configs.load(f"{name}:smoke")).stated()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(stated))
    assert settings.resolve(configs.load(str(path))).stated() == stated
    assert configs.load(str(path), {"seed": "77"}).seed == 77
    assert f"config.method: {stated['method']['name']}\n" in describe.described(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "it is no object"), ("{", "it is not JSON"), ('{"family": "flow"}', "missing")],
)
def test_a_file_that_no_run_has_written_is_refused(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        configs.load(str(path))
    with pytest.raises(InputError, match="takes no argument; override"):
        configs.load(f"{path}:smoke")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("seed", "None"),
        ("seed", "true"),
        ("seed", "1.0"),
        ("seed", "9" * 30),
        ("method.learning_rate", "None"),
        ("method.learning_rate", "True"),
        ("method.learning_rate", "{[]: 1}"),
        ("method.learning_rate", "-" * 5000 + "1"),
        ("method.learning_rate", "__import__('os').getpid()"),
        ("evals.accuracy.soft_labels", "1"),
        ("evals.accuracy.networks", "vgg11"),
        ("evals.accuracy.networks", "None"),
        ("evals.accuracy.networks", "(('vgg11',),)"),
        ("evals.accuracy.networks", "('vgg11', None)"),
        ("evals.accuracy.networks", "{'vgg11': 1}"),
    ],
)
def test_values_of_another_type_change_nothing(path, text):
    config = configs.load("ncfm")
    with pytest.raises(InputError, match=rf"config\.{path} is .*; it must be ") as error:
        configs.override(config, path, text)
    assert len(str(error.value)) < 250
    assert config == configs.load("ncfm")


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("seed", "7", 7),
        ("method.learning_rate", "1", 1.0),
        ("method.learning_rate", "3e-4", 3e-4),
        ("evals.accuracy.soft_labels", "true", True),
        ("evals.accuracy.networks", "['vgg11']", ("vgg11",)),
        ("evals.accuracy.networks", "()", ()),
        ("data.image_size", "64", 64),
        ("data.image_size", "None", None),
        ("data.name", "None", "None"),
        ("pool.dir", "/somewhere", "/somewhere"),
    ],
)
def test_values_that_fit(path, text, value):
    config = configs.load("ncfm:dataset=tiny_imagenet")
    configs.override(config, path, text)
    found = functools.reduce(lambda node, name: node[name], path.split("."), config)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("argument", ["ipc=" + "9" * 30, "ipc=" + "9" * 5000, "seed=1e3"])
def test_arguments_that_are_no_numbers_here(argument):
    with pytest.raises(InputError, match=r"config argument .* must be of type int") as error:
        configs.load(f"ncfm:{argument}")
    assert len(str(error.value)) < 250
