"""What is wrong is told at the beginning, with its name, and with what to do."""

import shutil

import numpy as np
import pytest

from jaxdistill import config as configs
from jaxdistill import main
from jaxdistill.errors import InputError
from tests.adversity.conftest import FLOW, command, contents, write

# Another JAX says the same.
pytestmark = pytest.mark.slow


def test_a_folder_in_the_place_of_a_file_is_named(finished, tmp_path):
    flags, workdir = finished
    names = [n for n in contents(workdir) if "checkpoints" not in n and "tensorboard" not in n]
    for number, name in enumerate(sorted(names)):
        copy = shutil.copytree(workdir, tmp_path / str(number))
        (copy / name).unlink()
        (copy / name).mkdir()
        (copy / name / "inside").touch()
        try:
            main.run([*flags, f"--workdir={copy}", "--config.seed=0"])
        except InputError as error:
            assert name.rpartition("/")[2] in str(error), name
        except OSError as error:
            assert name.rpartition("/")[2] in str(error.filename), name
        assert (copy / name / "inside").exists(), name
        shutil.rmtree(copy)


def test_one_class_is_not_distilled(tmp_path):
    data = write(tmp_path / "data.npz", classes=1)
    with pytest.raises(InputError, match="data has one class, and a set is distilled to tell"):
        main.run(command(data, f"--workdir={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "setting",
    ["image_size=8", "pad_to=8", "data_dir=/x", "holdout_per_class=3", "placement=streamed"],
)
def test_points_have_no_settings_of_images(setting, tmp_path):
    with pytest.raises(InputError, match=f"data.{setting.partition('=')[0]} means nothing for so"):
        main.run([*FLOW, f"--config.data.{setting}", f"--workdir={tmp_path / 'run'}"])


FEW = {
    "8 test images": ({"per_class": 4}, (), "8 test images are compared with, at least 65"),
    "few examples of many classes": (
        {"classes": 60, "per_class": 2},
        ("examples=100",),
        r"class '\d+' has [01] of the test images compared with, and its diversity takes 2",
    ),
}


@pytest.mark.parametrize("which", FEW)
def test_data_too_few_for_the_evaluation_are_refused_before_any_training(which, tmp_path):
    shape, settings, said = FEW[which]
    data = write(tmp_path / "data.npz", **shape)
    flags = [f"--config=flow:dataset={data},smoke,baselines=", f"--workdir={tmp_path / 'run'}"]
    with pytest.raises(InputError, match=said):
        main.run([*flags, *(f"--config.evals.samples.{s}" for s in settings)])
    assert not (tmp_path / "run").exists()


def test_a_path_may_have_commas_and_blanks(tmp_path):
    (tmp_path / "a,b c").mkdir()
    data = write(tmp_path / "a,b c" / "x,y.npz")
    spec, *rest = command("digits")
    flags = [*rest, f"--config.data.name={data}", f"--workdir={tmp_path / 'run'}"]
    main.run([spec, *flags])
    images = np.load(tmp_path / "run" / "artifacts" / "distilled.npz")["images"]
    assert images.shape == (2, 8, 8, 1)


@pytest.mark.parametrize("config", ["ncfm", "flow"])
@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "./some/folder"])
def test_a_recipe_follows_the_data_whichever_way_they_are_named(name, config):
    by_argument = configs.load(f"{config}:dataset={name}")
    assert configs.load(config, {"data.name": name}) == by_argument
    assert configs.load(f"{config}:dataset=digits", {"data.name": name}) == by_argument


def test_a_recipe_follows_the_method_whichever_way_it_is_named():
    for config, method in (("ncfm", "dm"), ("flow", "endpoint_8x"), ("flow", "linear")):
        by_argument = configs.load(f"{config}:method={method}")
        assert configs.load(config, {"method.name": method}) == by_argument


def test_the_name_that_a_recipe_gives_a_data_set_is_its_own():
    long = configs.load("ncfm", {"data.name": "imagenette/160px-v2"})
    assert configs.load("ncfm:dataset=imagenette") == long
    assert long.data.image_size == 128
