"""What the wheel promises, read from pyproject.toml and the lock files."""

import ast
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import jaxdistill

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]


def configs():
    """The files of `configs/` that define a config."""
    for path in sorted((ROOT / "configs").glob("*.py")):
        body = ast.parse(path.read_text("utf-8")).body
        if any(isinstance(node, ast.FunctionDef) and node.name == "get_config" for node in body):
            yield path


def lock(name):
    """The pins of a lock file, by normalized name."""
    lines = (ROOT / "requirements" / name).read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.lstrip().startswith("#")]
    return {re.sub(r"[-_.]+", "-", pin.name).lower(): pin for pin in pins}


def test_the_version_has_one_source():
    assert "version" in PROJECT["dynamic"]
    assert PYPROJECT["tool"]["hatch"]["version"]["path"] == "jaxdistill/__init__.py"
    assert str(Version(jaxdistill.__version__)) == jaxdistill.__version__
    try:
        installed = metadata.version("jaxdistill")
    except metadata.PackageNotFoundError:
        return
    assert installed == jaxdistill.__version__


def test_the_wheel_carries_every_config():
    wheel = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["jaxdistill"]
    carried = {ROOT / source: target for source, target in wheel["force-include"].items()}
    found = list(configs())
    assert found
    for path in found:
        assert carried[path.parent] == "jaxdistill/configs"


def test_the_command_line_program_exists():
    module, _, function = PROJECT["scripts"]["jaxdistill"].partition(":")
    body = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text("utf-8")).body
    assert function in [node.name for node in body if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize(("name", "python"), [("py311.txt", "3.11"), ("py312.txt", "3.12")])
def test_the_locks_satisfy_the_bounds(name, python):
    pins = lock(name)
    # Exact versions of registry packages, and nothing that names where they came from.
    for pin in pins.values():
        assert pin.url is None
        assert [part.operator for part in pin.specifier] == ["=="]
    wanted = list(PROJECT["dependencies"])
    for extra in ("docs", "hub", "lint", "notebook", "tensorboard", "test", "vlm"):
        wanted += PROJECT["optional-dependencies"][extra]
    for requirement in map(Requirement, wanted):
        if requirement.name == "jaxdistill":
            continue
        environment = {"python_version": python, "sys_platform": "linux"}
        if requirement.marker is None or requirement.marker.evaluate(environment):
            pin = pins[re.sub(r"[-_.]+", "-", requirement.name).lower()]
            version = next(iter(pin.specifier)).version
            assert requirement.specifier.contains(version), f"{requirement} but {pin}"


def test_jax_and_flax_are_locked_in_pairs_that_work():
    for name in ("py311.txt", "py312.txt"):
        pins = {key: Version(next(iter(pin.specifier)).version) for key, pin in lock(name).items()}
        assert not (pins["jax"] >= Version("0.11.1") and pins["flax"] <= Version("0.12.8"))
