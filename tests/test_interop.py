"""What is written here, in the hands of the libraries it is written for; extra `interop-test`."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import config as configs
from jaxdistill import experiment, export_student, load_student
from jaxdistill.io import diffusers as ours
from jaxdistill.tasks import published

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

FIXTURE = Path(__file__).parent / "fixtures" / "make_dit.py"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A pipeline's folder, written by diffusers, in shards."""
    folder = tmp_path_factory.mktemp("teacher") / "dit"
    model = runpy.run_path(str(FIXTURE))["network"](3, in_channels=1, out_channels=2)
    model.save_pretrained(folder / "transformer", max_shard_size="30KB")
    scheduler = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    scheduler.save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    root = tmp_path_factory.mktemp("student")
    argument = f"smoke,dataset=digits,method=linear,baselines=,teacher={teacher}"
    config = configs.load(f"flow:{argument}")
    config.evals = {}
    experiment.train(config, root / "run")
    export_student(root / "run", root / "out")
    return root


def said_by(model, x, time, label):
    tensors = (torch.from_numpy(np.array(a)) for a in (x.transpose(0, 3, 1, 2), time, label))
    x, time, label = tensors
    with torch.no_grad():
        said = model(x, timestep=time, class_labels=label.long()).sample
    return said.numpy().transpose(0, 2, 3, 1)


def test_the_fixture_is_what_the_library_says_today():
    made = runpy.run_path(str(FIXTURE))
    given = made["inputs"]()
    model = diffusers.DiTTransformer2DModel.from_pretrained(FIXTURE.parent / "dit/transformer")
    stored = np.load(FIXTURE.parent / "dit" / "outputs.npz", allow_pickle=False)
    with torch.no_grad():
        said = model(given["x"], timestep=given["time"], class_labels=given["label"]).sample
    np.testing.assert_allclose(said.numpy(), stored["output"], rtol=0, atol=5e-5)


def test_a_teacher_from_the_library_says_the_same_here(teacher):
    checkpoint = ours.read_checkpoint(teacher)
    assert len(list(checkpoint.folder.glob("*.safetensors"))) > 1
    params = ours.load_transformer(checkpoint.folder, checkpoint.shape)
    network = published.network(checkpoint)
    x = jax.random.normal(jax.random.key(0), (6, 8, 8, 1))
    time, label = jnp.array([0.0, 1.5, 40.0, 333.0, 800.0, 999.0]), jnp.array([0, 2, 4, 6, 9, 10])
    found = network.apply({"params": params}, x, time, label, method="predictions")
    model = diffusers.DiTTransformer2DModel.from_pretrained(teacher / "transformer")
    wanted = said_by(model, x, time, label)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-5)


def velocities(model, checkpoint, x, t, label):
    """The velocity by what a module of PyTorch says."""
    schedule = published.schedule_of(checkpoint)
    shown, time = schedule.enter(x, t)
    said = said_by(model, shown, time, label)[..., : checkpoint.shape.channels]
    return schedule.as_velocity(x, t, jnp.asarray(said))


def walked(model, checkpoint, key, label):
    """Two straight lines, at the times of the smoke student."""
    x = jax.random.normal(key, (len(label), 8, 8, 1))
    for t, after in ((1.0, 2 / 3), (2 / 3, 0.0)):
        times = jnp.full(len(label), t)
        x = x + (after - t) * velocities(model, checkpoint, x, times, label)
    return x


def test_a_merged_student_goes_where_it_goes_here(student):
    out, label, key = student / "out", jnp.arange(8), jax.random.key(7)
    model = diffusers.DiTTransformer2DModel.from_pretrained(out / "transformer")
    found = walked(model, ours.read_checkpoint(out), key, label)
    wanted = load_student(student / "run").sample(key, label, nfe=2)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * float(np.abs(wanted).max()))


def test_adapters_in_peft_go_where_it_goes_here(student, teacher):
    peft = pytest.importorskip("peft")
    label, key = jnp.arange(8), jax.random.key(7)
    base = diffusers.DiTTransformer2DModel.from_pretrained(teacher / "transformer")
    model = peft.PeftModel.from_pretrained(base, student / "out" / "adapter")
    found = walked(model.base_model.model, ours.read_checkpoint(teacher), key, label)
    wanted = load_student(student / "run").sample(key, label, nfe=2)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * float(np.abs(wanted).max()))
