"""Generate, then compress: one command over both families, stopped anywhere, and its refusals."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from jaxdistill import config as configs
from jaxdistill import experiment, main
from jaxdistill.data import sources
from jaxdistill.errors import InputError, Interrupted
from jaxdistill.eval.generate import _wanted

SPEC = "generate_compress:smoke"
EVAL = "generator.evals.generated"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("pipeline") / "run"
    main.run([f"--config={SPEC}", f"--workdir={workdir}"])
    return workdir


def generated(workdir):
    return sources.load("generated", data_dir=workdir / "generator" / "generated")


@pytest.mark.slow
def test_one_command_goes_from_real_images_to_networks_tested_on_real_images(whole):
    data, real = generated(whole), sources.load("digits")
    assert data.train.images.shape == (300, 8, 8, 1)
    np.testing.assert_array_equal(np.bincount(data.train.labels), 30)
    np.testing.assert_array_equal(data.test.images, real.test.images)
    np.testing.assert_array_equal(data.test.labels, real.test.labels)
    folder = whole / "generator" / "generated"
    card = json.loads((folder / "generated.json").read_text())
    assert card["generator"] == "ucgm, 2" and card["made_per_class"] == [30] * 10
    student = json.loads((whole / "generator/artifacts/student.json").read_text())
    assert card["provenance"]["teacher_sha256"] == student["provenance"]["teacher_sha256"]
    assert np.asarray(Image.open(folder / "generated.png")).std() > 1
    assert not list(folder.glob("part-*"))
    distilled = json.loads((whole / "artifacts/distilled.json").read_text())
    assert distilled["provenance"]["source_sha256"] == data.train.fingerprint()
    rows = {r["row"] for r in json.loads((whole / "results.json").read_text())}
    assert rows == {"rded", "random"}


@pytest.mark.slow
def test_stopped_anywhere_it_ends_the_same(whole, tmp_path):
    numbers, stops = np.random.default_rng(0), 0
    for _ in range(200):
        try:
            experiment.train(configs.load(SPEC), tmp_path, lambda: numbers.random() < 0.08)
            break
        except Interrupted:
            stops += 1
    assert 5 < stops < 200
    assert generated(tmp_path).train.fingerprint() == generated(whole).train.fingerprint()
    for name in ("generator/artifacts/student.safetensors", "artifacts/distilled.npz"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_the_same_command_does_nothing_twice_and_another_generator_is_refused(whole):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*.np*")}
    args = [f"--config={SPEC}", f"--workdir={whole}"]
    main.run(args)
    assert before == {p: p.stat().st_mtime_ns for p in whole.rglob("*.np*")}
    with pytest.raises(InputError, match="was started with another config"):
        main.run([*args, "--config.generator.method.consistency=0.5"])


@pytest.mark.slow
def test_rare_classes_alone_are_filled_up_beside_the_real_ones(whole, tmp_path):
    """Another data set by the same generator; its settings are an evaluation's."""
    more = {f"{EVAL}.per_class": "144", f"{EVAL}.fill": "True", f"{EVAL}.real": "True"}
    config = configs.load(SPEC, more)
    shutil.copytree(whole / "generator", tmp_path / "generator")
    experiment.train(config["generator"], tmp_path / "generator")
    data, real = generated(tmp_path), sources.load("digits")
    there = np.bincount(real.train.labels)
    assert there.min() < 144 < there.max()
    np.testing.assert_array_equal(np.bincount(data.train.labels), np.maximum(there, 144))
    np.testing.assert_array_equal(_wanted(real, 144, True), np.maximum(144 - there, 0))
    np.testing.assert_array_equal(data.train.images[: len(real.train.images)], real.train.images)
    # Without the real ones, and by the teacher: the surest of twice as many.
    more = {
        f"{EVAL}.filter": "confident",
        f"{EVAL}.teacher": "euler:2",
        f"{EVAL}.per_class": "8",
        f"{EVAL}.batch_size": "16",
    }
    (record, kept, _) = experiment.train(
        configs.load(SPEC, more)["generator"], tmp_path / "generator"
    )
    assert (record["row"], record["value"], kept["value"]) == ("teacher, euler, 2", 80, 0.5)
    # Back at the first settings, whose measurements are known, the set is made again.
    experiment.train(config["generator"], tmp_path / "generator")
    assert generated(tmp_path).train.fingerprint() == data.train.fingerprint()
    # No generator of a second's training makes what a classifier would take for its class.
    with pytest.raises(InputError, match=r"the classifier gave .* that label; take another filter"):
        experiment.train(
            configs.load(SPEC, more | {f"{EVAL}.filter": "consistent"})["generator"],
            tmp_path / "generator",
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.name": "generated", "generator.method.steps": "0"}, "generator.method.steps is 0"),
        ({f"{EVAL}.teacher": "nobody:3"}, "teacher_rows has 'nobody:3'"),
        ({f"{EVAL}.fill": "True"}, r"fill makes what the real images lack; set real=True"),
        ({f"{EVAL}.fill": "True", f"{EVAL}.real": "True"}, "has 30 training images or more; raise"),
        ({"method.factor": "3"}, "factor"),
        ({"evals.accuracy.networks": "('nobody',)"}, "unknown network 'nobody'"),
    ],
)
def test_what_cannot_end_well_is_refused_before_the_generator_is_trained(
    overrides, message, tmp_path
):
    with pytest.raises(InputError, match=message):
        experiment.train(configs.load(SPEC, overrides), tmp_path / "run")
    assert not (tmp_path / "run" / "generator" / "teacher").exists()


def test_generated_images_need_a_generator_or_a_folder(tmp_path):
    with pytest.raises(InputError, match=r"made by the run of config\.generator; give it, or"):
        configs_of = configs.load("rded:smoke").unlock()
        configs_of.data.name = "generated"
        experiment.set_up(configs_of, tmp_path)
    config = configs.load(SPEC).to_dict()
    del config["generator"]["evals"]["generated"]
    with pytest.raises(InputError, match="by its evaluation generated; set both"):
        experiment.train(config, tmp_path)
    points = configs.load("ucgm:smoke,baselines=").to_dict()
    points["evals"] = {"generated": {"name": "generate"}}
    with pytest.raises(InputError, match="soft4 has no labels"):
        experiment.train(points, tmp_path)
