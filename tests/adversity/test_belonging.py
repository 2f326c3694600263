"""A result belongs to the data and the settings that it is printed for, or there is none."""

import itertools
import json
import shutil

import numpy as np
import pytest

from jaxdistill import load_distilled, main
from jaxdistill.errors import InputError, Interrupted
from tests.adversity.conftest import command, contents, write

# Another JAX says the same.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def _done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    data = write(folder / "data.npz")
    main.run(command(data, f"--workdir={folder / 'run'}"))
    return shutil.copytree(folder, tmp_path_factory.mktemp("kept") / "done"), folder


@pytest.fixture
def done(_done):
    """A folder with a finished run on a file of images, and the file: always the same paths."""
    kept, folder = _done
    shutil.rmtree(folder)
    return shutil.copytree(kept, folder)


def _replace_test(path):
    arrays = dict(np.load(path))
    arrays["test_images"] = arrays["test_images"] ^ 1
    np.savez(path, **arrays)


REPLACED = {
    "other pixels": (lambda path: write(path, seed=1), "source_sha256"),
    "another test split": (_replace_test, "test_sha256"),
    "a third class": (lambda path: write(path, classes=3), "source_sha256"),
    "another size": (lambda path: write(path, side=16), "source_sha256"),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("change", REPLACED)
def test_replaced_data_are_noticed_by_a_finished_run(change, mode, done):
    replace, said = REPLACED[change]
    replace(done / "data.npz")
    before = contents(done)
    with pytest.raises(InputError, match=rf"another config \(.*{said}=\w+, now \w+"):
        main.run(command(done / "data.npz", f"--workdir={done / 'run'}", f"--mode={mode}"))
    assert contents(done) == before


STOPS = {
    "extractors": lambda workdir: (workdir / "pool").is_dir(),
    "steps": lambda workdir: any(workdir.glob("checkpoints/2")),
}


@pytest.mark.parametrize("stage", STOPS)
def test_replaced_data_are_noticed_by_a_run_that_goes_on(stage, tmp_path):
    data, workdir = write(tmp_path / "data.npz"), tmp_path / "run"
    with pytest.raises(Interrupted):
        main.run(command(data, f"--workdir={workdir}"), lambda: STOPS[stage](workdir))
    write(data, seed=1)
    before = contents(workdir)
    with pytest.raises(InputError, match="source_sha256"):
        main.run(command(data, f"--workdir={workdir}"))
    assert contents(workdir) == before


def _flow(data, workdir, *flags):
    settings = ("examples=100", "paired=8", "reference_steps=2", "teacher_rows=('euler:2',)")
    return [
        f"--config=flow:dataset={data},smoke,baselines=",
        "--config.model.patch=4",
        *(f"--config.evals.samples.{s}" for s in settings),
        f"--workdir={workdir}",
        *flags,
    ]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A flow run on a file of images that ended when its teacher was there."""
    folder = tmp_path_factory.mktemp("taught")
    data, workdir = write(folder / "data.npz", per_class=60), folder / "run"
    teacher = workdir / "teacher" / "teacher.safetensors"
    with pytest.raises(Interrupted):
        main.run(_flow(data, workdir), teacher.is_file)
    # As after a kill between the teacher and its student.
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "row.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [("data", "source_sha256"), ("--config.teacher.steps=30", "teacher.steps=20, now 30")],
)
def test_a_teacher_belongs_to_its_data_and_settings(change, said, taught):
    data, workdir = taught / "data.npz", taught / "run"
    write(data, seed=1 if change == "data" else 0, per_class=60)
    before = contents(workdir / "teacher")
    with pytest.raises(InputError, match=rf"another config \({said}"):
        main.run(_flow(data, workdir, *([change] if change != "data" else [])))
    assert contents(workdir / "teacher") == before
    assert not (workdir / "row.json").exists()


def _forget(workdir, *names):
    for name in names:
        (workdir / name).unlink()


OTHER = {"condense": "--config.method.learning_rate=0.3", "flow": "--config.method.steps=9"}


@pytest.mark.parametrize("forgotten", [(), ("config.json",), ("config.json", "row.json")])
def test_an_artefact_is_compared_with_its_run(forgotten, copied):
    flags, workdir = copied
    _forget(workdir, *forgotten)
    flag = OTHER["flow" if "flow" in flags[0] else "condense"]
    before = contents(workdir / "artifacts")
    with pytest.raises(InputError, match=r"was started with another config|has no card of the run"):
        main.run([*flags, flag, f"--workdir={workdir}"])
    assert contents(workdir / "artifacts") == before


def test_an_artefact_of_another_run_is_refused(copied, tmp_path):
    flags, workdir = copied
    other = tmp_path / "other"
    main.run([*flags, "--config.seed=1", f"--workdir={other}"])
    shutil.rmtree(workdir / "artifacts")
    shutil.copytree(other / "artifacts", workdir / "artifacts")
    before = contents(workdir / "artifacts")
    for mode in ("train", "eval"):
        with pytest.raises(InputError, match="has no card of the run"):
            main.run([*flags, f"--workdir={workdir}", f"--mode={mode}"])
    assert contents(workdir / "artifacts") == before


def test_an_artefact_without_its_card_or_damaged_says_what_to_do(copied):
    flags, workdir = copied
    (artefact,) = itertools.chain(
        workdir.glob("artifacts/distilled.npz"), workdir.glob("artifacts/student.safetensors")
    )
    whole = artefact.read_bytes()
    artefact.write_bytes(whole[: len(whole) // 2])
    told = "delete .*/artifacts, and the same command makes it again"
    with pytest.raises(InputError, match=told):
        main.run([*flags, f"--workdir={workdir}"])
    artefact.write_bytes(whole)
    card = artefact.with_suffix(".json")
    card.unlink()
    with pytest.raises(InputError, match=told):
        main.run([*flags, f"--workdir={workdir}", "--mode=eval"])
    artefact.unlink()
    main.run([*flags, f"--workdir={workdir}"])
    assert card.is_file() and artefact.read_bytes() == whole


def test_soft_labels_belong_to_their_temperature(done):
    soft = command(done / "data.npz", f"--workdir={done / 'run'}")
    soft += ["--config.evals.accuracy.soft_labels=True"]
    main.run(soft)
    stored = load_distilled(done / "run")
    assert stored.card["temperature"] == 1.0
    main.run([*soft, "--mode=eval", "--config.evals.accuracy.temperature=0.05"])
    records = json.loads((done / "run" / "results.json").read_text())
    protocols = {r["protocol"] for r in records if "soft" in r["metric"]}
    assert len(protocols) == 2
    kept = load_distilled(done / "run")
    assert kept.card["temperature"] == 1.0
    np.testing.assert_array_equal(kept.soft_labels, stored.soft_labels)
