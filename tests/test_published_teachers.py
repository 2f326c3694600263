"""Students of transformers of diffusers, from the command line: read, distilled, used, refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxdistill import config as configs
from jaxdistill import experiment, export_student, load_student
from jaxdistill.errors import InputError
from jaxdistill.flow.samplers import euler
from jaxdistill.io import diffusers, weights
from jaxdistill.nn.transformer2d import Shape
from jaxdistill.tasks import published

DIFFUSION = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
STRAIGHT = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
SHAPE = Shape(8, 1, 2, 2, 8, 2, 10, variance=True)


def write(folder, shape=SHAPE, scheduler=DIFFUSION, scale=0.1):
    """A random transformer in the files of diffusers."""
    rng = np.random.default_rng(0)
    sizes = diffusers._shapes(shape)
    tensors = {k: scale * rng.normal(size=s).astype(np.float32) for k, s in sizes.items()}
    where = folder / "transformer"
    diffusers.save_transformer(where, diffusers.params_of(tensors, shape), shape)
    (where / "config.json").write_text(json.dumps(diffusers.config_of(shape)))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    return {
        "diffusion": write(root / "diffusion"),
        "straight": write(root / "straight", SHAPE._replace(variance=False), STRAIGHT),
    }


def config_for(teacher, **arguments):
    said = {"dataset": "digits", "baselines": "", "teacher": teacher, **arguments}
    return "flow:smoke," + ",".join(f"{name}={value}" for name, value in said.items())


@pytest.fixture(scope="module")
def linear(teachers, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "linear"
    config = configs.load(config_for(teachers["diffusion"], method="linear"))
    config.evals = {}
    experiment.train(config, workdir)
    return workdir


def test_a_student_is_made_and_used(linear, teachers):
    _, card = weights.load(linear / "artifacts", "student")
    checkpoint = diffusers.read_checkpoint(teachers["diffusion"])
    assert card["provenance"]["teacher_sha256"] == diffusers.fingerprint(checkpoint)
    assert not (linear / "teacher").exists()
    made = load_student(linear).sample(jax.random.key(0), jnp.arange(4), nfe=2)
    assert made.shape == (4, 8, 8, 1) and np.isfinite(made).all()


@pytest.fixture(scope="module")
def exported(linear, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "student"
    export_student(linear, out)
    return out


def test_a_merged_student_is_a_transformer_of_the_same_velocity(linear, exported, teachers):
    checkpoint = diffusers.read_checkpoint(exported)
    assert checkpoint.config == diffusers.read_checkpoint(teachers["diffusion"]).config
    params = diffusers.load_transformer(checkpoint.folder, checkpoint.shape)
    network = published.network(checkpoint)
    label = jnp.arange(8)
    velocity = jax.jit(lambda x, t: network.apply({"params": params}, x, t, label))
    noise = jax.random.normal(jax.random.key(5), (8, 8, 8, 1))
    # A straight line a call, at the times that the student was trained for.
    times = jnp.array([1.0, 2 / 3, 0.0])
    found = euler(velocity, noise, times)
    wanted = load_student(linear).sample(jax.random.key(5), label, nfe=2)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    before = diffusers.load_transformer(teachers["diffusion"] / "transformer", SHAPE)
    moved = {"/".join(p.key for p in path) for path, _ in jax.tree.leaves_with_path(params)}
    same = jax.tree.map(np.array_equal, params, before)
    kept = {"/".join(p.key for p in path) for path, x in jax.tree.leaves_with_path(same) if x}
    layers = {f"{part}/{name}" for part in ("blocks", "condition") for name in ("up", "down")}
    assert moved - kept == {f"{x}/kernel" for x in layers} | {"output/bias", "output/kernel"}


def test_adapters_in_pefts_words_make_the_merged_weights(exported, teachers):
    adapters = safetensors.numpy.load_file(exported / "adapter" / "adapter_model.safetensors")
    said = json.loads((exported / "adapter" / "adapter_config.json").read_text())
    assert said["peft_type"] == "LORA" and said["modules_to_save"] == ["proj_out_2"]
    place = ("transformer", f"{diffusers.STEM}.safetensors")
    base, merged = (
        safetensors.numpy.load_file(folder.joinpath(*place))
        for folder in (teachers["diffusion"], exported)
    )
    assert len(said["target_modules"]) == 2 * 4
    for name in said["target_modules"]:
        a, b = (adapters.pop(f"base_model.model.{name}.lora_{x}.weight") for x in "AB")
        assert a.shape[0] == b.shape[1] == said["r"] and np.abs(b).max() > 0
        weight = base.pop(f"{name}.weight") + said["lora_alpha"] / said["r"] * b @ a
        np.testing.assert_allclose(merged.pop(f"{name}.weight"), weight, rtol=0, atol=1e-6)
    for end in ("weight", "bias"):
        whole = adapters.pop(f"base_model.model.proj_out_2.{end}")
        np.testing.assert_array_equal(whole, merged.pop(f"proj_out_2.{end}"))
        # The rows of the variances are the teacher's.
        mine, own = (x.reshape(4, 2, -1) for x in (whole, base.pop(f"proj_out_2.{end}")))
        np.testing.assert_array_equal(mine[:, 1], own[:, 1])
        assert not np.array_equal(mine[:, 0], own[:, 0])
    assert not adapters
    for name, x in base.items():
        np.testing.assert_array_equal(merged[name], x)


def test_the_readme_says_when_it_is_called_and_no_folder_is_named(exported, teachers):
    text = (exported / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: diffusers\n")
    assert "| 1 | 1 | 999 | 1 |" in text and "| 2 | 0.666667 | " in text
    for path in exported.rglob("*.json"):
        assert str(teachers["diffusion"].parent) not in path.read_text()


def test_students_that_follow_curves_keep_their_head(teachers, tmp_path):
    config = configs.load(config_for(teachers["diffusion"], method="arcflow"))
    config.evals, config.method.steps = {}, 1
    experiment.train(config, tmp_path / "run")
    export_student(tmp_path / "run", tmp_path / "out")
    head, _ = weights.load(tmp_path / "out", "head")
    trained, _ = weights.load(tmp_path / "run" / "artifacts", "student")
    jax.tree.map(np.testing.assert_array_equal, head, trained["head"])
    assert not (tmp_path / "out" / "transformer").exists()
    said = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert said["modules_to_save"] is None
    before = {p: p.read_bytes() for p in teachers["diffusion"].rglob("*") if p.is_file()}
    for taken, message in [
        (tmp_path / "out", "holds adapter, head.safetensors already"),
        (tmp_path / "run" / "artifacts", "holds a student of a run"),
        (teachers["diffusion"], "holds transformer already"),
        (teachers["diffusion"] / "transformer", r"holds config\.json already"),
    ]:
        with pytest.raises(InputError, match=message):
            export_student(tmp_path / "run", taken)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_another_teacher_in_its_place_is_refused(linear, teachers, tmp_path):
    other = shutil.copytree(teachers["diffusion"], tmp_path / "other")
    said = other / "scheduler" / "scheduler_config.json"
    said.write_text(json.dumps(DIFFUSION | {"beta_end": 0.03}))
    with pytest.raises(InputError, match="is not that of the student"):
        load_student(linear, other)


@pytest.mark.parametrize("kind", ["diffusion", "straight"])
@pytest.mark.parametrize("method", ["linear", "arcflow"])
def test_untrained_students_are_their_teachers(teachers, tmp_path, kind, method):
    config = configs.load(config_for(teachers[kind], method=method))
    config.method.rank, config.path.shift = 2, 1.0
    if method == "arcflow":
        config.method.modes = 1  # more begin apart by noise
    ready = experiment.set_up(config, tmp_path)
    task, recipe = ready.loaded.task, ready.recipes[method]
    frozen = recipe.frozen.load()
    keys = {"keys": jax.random.split(jax.random.key(1), 8)}
    output = recipe.method.output(recipe.method.init(jax.random.key(0), frozen, keys))
    noise, label = jax.random.normal(jax.random.key(2), (4, 8, 8, 1)), jnp.arange(4)
    times = jnp.array([1.0, 0.5, 0.0])
    wanted = euler(lambda x, t: task.velocity(frozen, x, t, label), noise, times)
    found = recipe.sample(output, frozen, noise, label, nfe=2)
    assert np.abs(wanted - noise).std() > 0.1
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_guidance_needs_no_label_drop_and_data_must_fit(teachers, tmp_path):
    config = configs.load(config_for(teachers["diffusion"]))
    config.path.shift, config.teacher.guidance = 1.0, 1.5
    ready = experiment.set_up(config, tmp_path / "a")
    assert ready.loaded.task.null == 10 and ready.loaded.task.nfe == 2
    for change, message in [
        (("teacher", "dir", None), "set teacher.dir to its folder"),
        (("teacher", "label_drop", 0.1), "leave them out"),
        (("data", "pad_to", 10), r"\(8, 8, 1\) and 10 classes; .* has \(10, 10, 1\)"),
    ]:
        changed = configs.load(config_for(teachers["diffusion"]))
        group, name, value = change
        changed[group][name] = value
        with pytest.raises(InputError, match=message):
            experiment.set_up(changed, tmp_path / "b")


def test_latents_need_no_data(tmp_path):
    sizes = Shape(32, 4, 2, 1, 4, 1, 1000, variance=True)
    write(tmp_path / "dit", sizes)
    config = configs.load(config_for(tmp_path / "dit", dataset="latents_imagenet", method="linear"))
    config.method.steps, config.method.batch_size = 1, 8
    config.model.dtype = "float32"
    experiment.train(config, tmp_path / "run")
    made = load_student(tmp_path / "run").sample(jax.random.key(0), jnp.zeros(1, jnp.int32))
    assert made.shape == (1, 32, 32, 4)
    config.method.from_data = True
    with pytest.raises(InputError, match="takes real examples"):
        experiment.train(config, tmp_path / "again")


def test_a_student_that_is_its_teacher_goes_out_as_it_came_in(teachers, tmp_path):
    checkpoint = diffusers.read_checkpoint(teachers["straight"])
    base = diffusers.load_transformer(checkpoint.folder, checkpoint.shape)
    gates = {"kernel": np.zeros((16, 4), np.float32), "bias": np.zeros(4, np.float32)}
    # Trained whole, with one straight line.
    checkpoint = checkpoint._replace(config=checkpoint.config | {"_name_or_path": "/home/me/dit"})
    trunk = {name: layer for name, layer in base.items() if name != "output"}
    student = {"trunk": trunk, "head": {"velocities": base["output"], "gates": gates}}
    card = {"nfe": 2, "shift": 1.0, "method": "linear", "licence": "none"}
    card |= {"config": {"teacher": {"dir": "/somewhere"}}}
    published.export(tmp_path / "out", checkpoint, base, student, card, 1.0)
    name = f"{diffusers.STEM}.safetensors"
    files = [folder / "transformer" / name for folder in (teachers["straight"], tmp_path / "out")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (tmp_path / "out" / "adapter").exists()
    assert not [
        p for p in (tmp_path / "out").rglob("*") if p.is_file() and b"/home/me" in p.read_bytes()
    ]
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| 2 | 0.5 | 500 | 1 |" in text and "velocity, noise minus data" in text
    curved = student | {"head": student["head"] | {"log_gammas": gates}}
    with pytest.raises(InputError, match="follows curves and was trained whole"):
        published.export(tmp_path / "new", checkpoint, base, curved, card, 1.0)
    with pytest.raises(InputError, match="layers beside trunk and head"):
        published.export(tmp_path / "new", checkpoint, base, student | {"more": {}}, card, 1.0)
    assert not (tmp_path / "new").exists()
