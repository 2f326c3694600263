"""The direction of imports, read from the source of every module."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import jaxdistill

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "jaxdistill"


class Use(NamedTuple):
    """A dotted name that a module imports or reaches through an import."""

    module: str
    line: int
    name: str

    def __str__(self):
        return f"{self.module}:{self.line} {self.name}"


def within(name, prefixes):
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def uses_in(source, module, is_package=False):
    """What a module uses, at any depth and in functions too, with aliases resolved."""
    tree = ast.parse(source)
    parent = module if is_package else module.rpartition(".")[0]
    aliases, found = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.split(".")[0]
                aliases[bound] = alias.name if alias.asname else bound
                found.append(Use(module, node.lineno, alias.name))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = parent.split(".")[: len(parent.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{base}.{alias.name}"
                found.append(Use(module, node.lineno, f"{base}.{alias.name}"))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("import_module", "__import__"):
                found.append(Use(module, node.lineno, str(node.args[0].value)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            head, _, rest = ast.unparse(node).partition(".")
            if head in aliases and rest.replace(".", "").isidentifier():
                found.append(Use(module, node.lineno, f"{aliases[head]}.{rest}"))
    return found


def modules(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        yield ".".join(parts[:-1] if is_package else parts), is_package, path.read_text("utf-8")


USES = [
    use
    for folder in (PACKAGE, "configs")
    for name, is_package, source in modules(folder)
    for use in uses_in(source, name, is_package)
]


def breaches(*, where=(PACKAGE,), but=(), forbidden):
    """Uses of forbidden names in some modules, less the excepted ones."""
    return [
        str(use)
        for use in USES
        if within(use.module, where) and not within(use.module, but) and within(use.name, forbidden)
    ]


def strays(where, may):
    """Uses of this package's names, in some modules, beyond the permitted ones."""
    return [
        str(use)
        for use in USES
        if within(use.module, [where]) and within(use.name, [PACKAGE]) and not within(use.name, may)
    ]


def inside(*names):
    return [f"{PACKAGE}.{name}" for name in names]


METHODS = inside("condense", "flow", "pairs", "vlm")
# What stands between a method and a run, and knows neither.
BETWEEN = inside("collective", "errors", "keywords", "method", "task")
# The modules that carry runs out.
ABOVE = inside(
    *("tasks", "stage", "run_folder", "experiment", "look", "report", "compile", "fit", "config"),
    *("completion", "describe", "main"),
)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import pickle", "pickle"),
        ("def f():\n    import flax.linen as nn", "flax.linen"),
        ("from flax import linen", "flax.linen"),
        ("import flax\nflax.linen.Dense(3)", "flax.linen.Dense"),
        ("import numpy as np\nnp.random.default_rng(0).normal()", "numpy.random.default_rng"),
        ("from numpy.random import default_rng", "numpy.random.default_rng"),
        ("from ..io import files", "jaxdistill.io.files"),
        ("from . import runner", "jaxdistill.condense.runner"),
        ("import importlib\nimportlib.import_module('jaxdistill.io')", "jaxdistill.io"),
    ],
)
def test_the_reader_sees_every_form_of_import(source, name):
    assert name in [use.name for use in uses_in(source, "jaxdistill.condense.ncfm")]


def test_the_reader_is_not_misled():
    source = "import jax\nfrom jax import random\nrandom.key(0)\nself.time.time()"
    names = [use.name for use in uses_in(source, "jaxdistill.condense.ncfm")]
    assert not [name for name in names if within(name, ["random", "time"])]
    inits = uses_in("from .charfn import ecf", "jaxdistill.condense", is_package=True)
    assert inits[0].name == "jaxdistill.condense.charfn.ecf"
    assert {"jaxdistill.method", "jaxdistill.nn.conv"} <= {use.module for use in USES}


def test_only_the_networks_use_linen():
    assert not breaches(but=inside("nn"), forbidden=["flax.linen", "flax.nnx"])


def test_nothing_uses_another_framework():
    assert not breaches(where=(PACKAGE, "configs"), forbidden=["tensorflow", "torch", "clu"])


# Modules that unpickle, or that run what a file says; `io.reading` reads what numpy.load would.
UNPICKLERS = [
    *["pickle", "_pickle", "pickletools", "cloudpickle", "dill", "jsonpickle", "joblib", "shelve"],
    *["marshal", "copyreg", "torch", "pandas", "yaml", "h5py", "runpy", "code"],
    *["numpy.load", "numpy.loadtxt", "numpy.genfromtxt", "numpy.lib.npyio", "numpy.memmap"],
]


def unsafe_calls(source, module):
    """Calls that read arrays and do not say `allow_pickle=False`, and calls of eval and exec."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            reads = called.rpartition(".")[2] in ("load", "read_array") and called.startswith("np")
            unsaid = reads and "allow_pickle" not in keywords
            allowed = keywords.get("allow_pickle", "False") != "False"
            if unsaid or allowed or called in ("eval", "exec", "compile"):
                yield f"{module}:{node.lineno} {called}"


def test_nothing_unpickles():
    assert not breaches(where=(PACKAGE, "configs"), forbidden=UNPICKLERS)
    for folder in (PACKAGE, "configs"):
        for name, _, source in modules(folder):
            assert not list(unsafe_calls(source, name))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(x)",
        "from numpy import load\nload(x)",
        "import numpy as np\nnp.load(x, allow_pickle=False)",
        "import importlib\nimportlib.import_module('dill')",
        "import numpy as np\nnp.lib.format.read_array(x)",
        "def f():\n    np.lib.format.read_array(x, allow_pickle=flag)",
        "archive(x, allow_pickle=True)",
        "eval(x)",
    ],
)
def test_unpickling_would_be_seen(source):
    named = [use.name for use in uses_in(source, "jaxdistill.io.x") if within(use.name, UNPICKLERS)]
    assert named or list(unsafe_calls(source, "jaxdistill.io.x"))


@pytest.mark.parametrize("room", METHODS)
def test_methods_know_neither_runner_nor_files(room):
    assert not strays(room, [room, *BETWEEN, *inside("data.augment", "lazy", "nn")])


def test_networks_know_only_networks():
    assert not strays(f"{PACKAGE}.nn", inside("nn", "errors", "lazy", "task"))


@pytest.mark.parametrize("module", BETWEEN)
def test_the_contract_knows_nothing_but_itself(module):
    assert not strays(module, BETWEEN)


@pytest.mark.parametrize("room", inside("io", "data"))
def test_files_and_data_know_no_method(room):
    above = [*METHODS, *ABOVE, *inside("eval", "experts", "pool", "runner", "settings", "task")]
    above += inside("release")
    assert not breaches(where=(room,), forbidden=above)


def test_evaluation_knows_neither_runner_nor_checkpoints():
    assert not breaches(
        where=inside("eval"), forbidden=[*ABOVE, *inside("runner", "io.checkpoint")]
    )


def test_the_runner_takes_any_method():
    above = [*METHODS, *ABOVE, *inside("eval", "task", "settings")]
    assert not breaches(where=inside("runner"), forbidden=above)


def test_nothing_above_the_families_names_a_method():
    """A method is found by its name; only a family knows mathematics of its own room."""
    where = inside("experiment", "compile", "fit", "config", "main", "settings", "stage")
    where += inside("completion", "report", "run_folder", "students", "tasks.pretrained")
    families = inside("tasks.condense", "tasks.flow", "tasks.pairs", "tasks.vlm")
    assert not breaches(where=where, forbidden=[*METHODS, *families])


def test_programs_are_looked_at_without_being_run():
    assert not breaches(
        where=inside("compile", "fit"),
        forbidden=inside("stage", "run_folder", "eval", "experiment"),
    )


def test_families_do_not_know_each_other():
    families = [inside(f"tasks.{name}", name) for name in ("condense", "flow", "pairs", "vlm")]
    for family in families:
        others = [name for other in families if other is not family for name in other]
        assert not breaches(where=family, forbidden=others)


def test_flags_and_configs_stay_at_the_edge():
    assert not breaches(but=inside("main"), forbidden=["absl.flags", "absl.app"])
    assert not breaches(but=inside("config"), forbidden=["ml_collections"])


def test_resumable_code_draws_only_from_keys():
    hidden = ["numpy.random", "random", "secrets", "time", "datetime", "uuid", "os.urandom"]
    assert not breaches(where=[*METHODS, *inside("nn")], forbidden=hidden)


def loaded(statement, candidates):
    """Which of the candidate packages an import brings in, in a fresh interpreter."""
    program = f"{statement}\nimport sys\nprint(*[n for n in {candidates} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_importing_the_package_is_cheap():
    assert loaded(f"import {PACKAGE}", ["jax", "numpy", "flax", "optax", "PIL", "sklearn"]) == []


@pytest.mark.parametrize("name", ["charfn", "momentum", "losses"])
def test_pure_mathematics_comes_alone(name):
    heavy = ["flax", "optax", "orbax", "tensorflow_datasets", "sklearn", "PIL", "ml_collections"]
    place = f"{PACKAGE}.vlm" if name == "losses" else PACKAGE
    assert loaded(f"from {place} import {name}", heavy) == []


def test_every_public_name_is_there_and_comes_on_first_use():
    assert jaxdistill.__all__ == sorted(set(jaxdistill.__all__))
    for name in jaxdistill.__all__:
        assert getattr(jaxdistill, name) is not None
    assert set(jaxdistill.__all__) <= set(dir(jaxdistill))
    assert jaxdistill.condense.ncfm.recipe and jaxdistill.flow.arcflow.recipe


@pytest.mark.parametrize("room", ["condense", "flow", "pairs", "vlm"])
def test_rooms_have_their_modules(room):
    package = getattr(jaxdistill, room)
    assert "recipe" not in package.__all__ and len(package.__all__) > 5
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_what_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        jaxdistill.nothing  # noqa: B018
