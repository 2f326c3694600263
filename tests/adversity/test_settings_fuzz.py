"""Every setting of every config, at values that nobody means: taken, or one line that names it.

`python tests/adversity/test_settings_fuzz.py` runs what is taken, each to its end.
"""

import sys
import tempfile
import traceback
from pathlib import Path

import ml_collections
import pytest

from jaxdistill import config as configs
from jaxdistill import experiment, main
from jaxdistill.errors import InputError, Interrupted

# Another JAX says the same.
pytestmark = pytest.mark.slow

VALUES = ("0", "-1", "nan", "inf", "1e30", "some text", "None", "9" * 18, "()", "0.5")
SPECS = {
    "ncfm:dataset=digits,ipc=1,smoke,baselines=dm+random+start": "condense",
    "flow:dataset=soft4,smoke,baselines=linear+progressive+endpoint_8x": "points",
    "flow:dataset=digits,smoke,baselines=straight+gaussian": "images",
    "dmd2:smoke,baselines=adversarial+pcm+meanflow": "two calls",
    "genrecal:smoke,tokenizers=one,patches=one,"
    "baselines=alm+dskd+gkd+minillm+distillm+llava_kd": "answers",
}


def leaves(node, prefix=""):
    """Path and value of every setting of a config."""
    for name, value in node.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@pytest.fixture(scope="module", params=SPECS, ids=SPECS.values())
def spec(request):
    return request.param


def attempt(spec, path, text, workdir):
    """What a setting's value leads to before anything is trained: the config, or a line."""
    try:
        config = configs.load(spec, {path: text})
        experiment.set_up(config, workdir)
        return config
    except InputError as error:
        return str(error)


def test_every_setting_takes_a_value_or_is_named(spec, tmp_path):
    taken = []
    for number, (path, before) in enumerate(leaves(configs.load(spec))):
        # Every third value here; all of them would take minutes.
        for text in VALUES[number % 3 :: 3]:
            found = attempt(spec, path, text, tmp_path / "run")
            if not isinstance(found, str):
                taken.append((path, text))
                continue
            assert "\n" not in found and len(found) < 700
            # The setting by its name, or by what it leads to.
            last = path.rpartition(".")[2]
            assert last in found or str(before) in found or text in found, (path, text, found)
    assert not (tmp_path / "run").exists()
    wild = [(p, t) for p, t in taken if t in ("nan", "inf", "1e30") and not p.endswith(TEXTS)]
    assert not wild


# Texts may be anything that names a folder; the sampler climbs, and says so where it diverges.
TEXTS = (".dir", ".judge_dir", ".data_dir", ".sampler_learning_rate")


def run_what_is_taken(only=None):
    """Runs every accepted value to its end; prints what ends in anything but success or a line."""
    failures = 0
    for spec, name in SPECS.items():
        if only and name != only:
            continue
        for path, _ in leaves(configs.load(spec)):
            for text in VALUES:
                if path.endswith(TEXTS) or text == "9" * 18:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    workdir = Path(folder) / "run"
                    if isinstance(attempt(spec, path, text, workdir), str):
                        continue
                    flags = [f"--config={spec}", f"--config.{path}={text}", f"--workdir={workdir}"]
                    try:
                        main.run(flags)
                        said = "done"
                    except (InputError, Interrupted) as error:
                        said = f"line: {error}"
                    except Exception:  # what is looked for
                        failures += 1
                        said = f"FAILED\n{traceback.format_exc()}"
                print(f"{name} {path}={text}: {said}", file=sys.stderr, flush=True)
    print(f"{failures} failures", file=sys.stderr)


if __name__ == "__main__":
    run_what_is_taken(*sys.argv[1:])
