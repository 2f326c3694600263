"""The programs that the documentation shows, run as they stand."""

import contextlib
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from jaxdistill import config as configs
from jaxdistill import main, runner, settings
from jaxdistill.data import device, sources
from jaxdistill.errors import InputError, Interrupted
from jaxdistill.io import artifact

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"


def run(name, folder, monkeypatch):
    """What a script leaves in its global names, run in a folder as a user does."""
    monkeypatch.chdir(folder)
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_the_smallest_method_finds_the_class_means(tmp_path, monkeypatch):
    names = run("smallest_method.py", tmp_path, monkeypatch)
    lines = (tmp_path / "runs" / "means" / "metrics.jsonl").read_text("utf-8").splitlines()
    distances = [json.loads(line)["distance"] for line in lines]
    assert distances[-1] < 0.01 * distances[0]
    images = np.asarray(names["method"].output(names["state"])["images"])
    train, classes = names["digits"].train, names["digits"].num_classes
    means = np.stack([train.images[train.labels == c].mean(0) / 255 for c in range(classes)])
    assert images.shape == (classes, 1, 8, 8, 1)
    np.testing.assert_allclose(images[:, 0], means, atol=0.04)


def test_the_smallest_method_runs_on_both_backends(tmp_path, monkeypatch):
    build = runpy.run_path(str(EXAMPLES / "smallest_method.py"))["mean_matching"]
    digits = sources.load("digits")
    data = device.resident({"images": digits.train.images}, digits.train.labels, 10)
    states = [
        runner.run(
            build(optax.adam(0.05), ipc=2, batch_real=16),
            data=data,
            key=jax.random.key(1),
            steps=3,
            backend=backend,
        )
        for backend in ("jit", "pmap")
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *states)


@pytest.mark.slow
def test_the_library_example_closes_the_gap(tmp_path, monkeypatch, capsys):
    names = run("library.py", tmp_path, monkeypatch)
    before, after = (float(line.split()[1]) for line in capsys.readouterr().out.splitlines())
    assert after < before / 2
    moved = np.square(names["players"]["freqs"] - names["freqs"])
    assert moved.mean() > 1e-3


@pytest.mark.slow
def test_the_example_of_assessing_finds_copies_and_shares_out(tmp_path, monkeypatch, capsys):
    run("assess_arrays.py", tmp_path, monkeypatch)
    assert capsys.readouterr().out == "[[0, 50], [1, 51]]\n[4, 9, 17]\n"


def test_a_plain_file_of_parameters_becomes_a_teacher(tmp_path, monkeypatch):
    config = configs.load("ucgm:dataset=soft4,baselines=,smoke")
    experiment = settings.resolve(config)
    task = experiment.family.shapes(experiment)
    label = jnp.zeros(1, jnp.int32)
    args = jnp.zeros((1, *task.shape)), jnp.zeros(1), label
    params = task.trunk.init(jax.random.key(0), *args)["params"]
    flat = flatten_dict(jax.device_get(params), sep="/")
    safetensors.numpy.save_file(flat, tmp_path / "network.safetensors")
    names = run("teacher_from_file.py", tmp_path, monkeypatch)
    assert {r["row"] for r in names["records"]} >= {"ucgm, 1", "ucgm, 2"}
    card = json.loads((tmp_path / "runs/tuned/artifacts/student.json").read_text())
    teacher = json.loads((tmp_path / "teacher/teacher.json").read_text())
    assert card["provenance"]["teacher_sha256"] == teacher["sha256"]
    safetensors.numpy.save_file({**flat, "one/more": np.zeros(3)}, tmp_path / "network.safetensors")
    with pytest.raises(InputError, match="has one/more of shape"):
        run("teacher_from_file.py", tmp_path, monkeypatch)


def test_the_library_example_is_short():
    lines = (EXAMPLES / "library.py").read_text("utf-8").splitlines()[1:]
    assert len([line for line in lines if line]) <= 15


@pytest.fixture(scope="module")
def student_example(tmp_path_factory):
    """The names that the example of a student leaves, and its folder."""
    folder = tmp_path_factory.mktemp("student")
    with contextlib.chdir(folder):
        return runpy.run_path(str(EXAMPLES / "student.py")), folder


@pytest.mark.slow
def test_the_student_example_beats_euler(student_example):
    names, folder = student_example
    assert names["ours"] < 0.25 * names["euler"]
    assert int(names["state"].queries) == 600 * 2 * 4  # steps, segments, queries
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_the_example_of_tuning_comes_near_to_many_calls_in_two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(EXAMPLES / "tune.py"))
    assert names["before"] < 0.5 < 0.75 < names["after"] and names["many"] > 0.9


@pytest.mark.slow
def test_the_teacher_of_the_student_example_is_the_velocity_of_its_data(student_example):
    names, _ = student_example

    def log_density(x, t):
        variance = ((1 - t) * names["STD"]) ** 2 + t**2
        away = x - (1 - t) * names["corners"]
        return jax.nn.logsumexp(-(away**2).sum(-1) / (2 * variance))

    x = jax.random.normal(jax.random.key(0), (50, 2))
    t = jax.random.uniform(jax.random.key(1), (50,), minval=0.1, maxval=0.9)
    noise = -t[:, None] * jax.vmap(jax.grad(log_density))(x, t)
    data = (x - t[:, None] * noise) / (1 - t[:, None])
    made = names["teacher"]((), x, t, np.zeros(50, np.int32))
    np.testing.assert_allclose(made, noise - data, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_loss_of_ones_own_is_judged(tmp_path, monkeypatch, capsys):
    names = run("judge_a_loss.py", tmp_path, monkeypatch)
    gap, (far, near) = names["gap"], names["cosines"]
    assert gap.gradient < 1e-8 and abs(gap.drift) < 1e-4 < 0.1 < gap.random_value
    assert far < 0.98 and near < 0.98 and names["after"] < 0.5 * names["before"]
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_loss_across_tokenizers_in_a_program(tmp_path, monkeypatch):
    names = run("cross_tokenizer_loss.py", tmp_path, monkeypatch)
    # "ab", " ab"; and two characters around a space, which is a token of its own.
    assert [side.tolist() for side in names["groups"][0]] == [
        [0, 0, 1, 2, 3, -1],
        [0, 1, 2, 3, -1],
    ]
    assert [side.tolist() for side in names["groups"][1]] == [
        [0, 0, 1, 2, 2, 3],
        [0, 1, 2, 3, -1],
    ]
    size = np.abs(names["gradient"]).max(-1)
    assert (size[:, :4] > 0).all() and (size[:, 4] == 0).all()
    value, gradient = names["value"], names["gradient"]
    moved = names["loss"](names["student_logits"] - 1e-2 * gradient / np.linalg.norm(gradient))
    assert moved < value


def test_a_decoder_of_another_library_goes_in_and_out(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    sizes = {"embed_tokens.weight": (19, 16), "norm.weight": (16,)}
    for i in range(2):
        block = {
            "input_layernorm.weight": (16,),
            "post_attention_layernorm.weight": (16,),
            "self_attn.q_proj.weight": (16, 16),
            "self_attn.q_proj.bias": (16,),
            "self_attn.k_proj.weight": (8, 16),
            "self_attn.k_proj.bias": (8,),
            "self_attn.v_proj.weight": (8, 16),
            "self_attn.v_proj.bias": (8,),
            "self_attn.o_proj.weight": (16, 16),
            "mlp.gate_proj.weight": (24, 16),
            "mlp.up_proj.weight": (24, 16),
            "mlp.down_proj.weight": (16, 24),
        }
        sizes |= {f"layers.{i}.{name}": size for name, size in block.items()}
    tensors = {f"model.{name}": rng.normal(size=size) for name, size in sizes.items()}
    tensors = {name: x.astype(jnp.bfloat16) for name, x in tensors.items()}
    config = {
        "model_type": "qwen2_vl",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]},
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "vocab_size": 19,
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    eyes = {"visual.merger.ln_q.weight": np.ones(3, np.float32)}
    safetensors.numpy.save_file(tensors | eyes, tmp_path / "model" / "model.safetensors")
    names = run("decoder_of_another_library.py", tmp_path, monkeypatch)
    assert names["hidden"].shape == (1, 4 + 4, 16) and np.isfinite(names["hidden"]).all()
    first, second = capsys.readouterr().out.splitlines()
    assert first == "1 tensors are no part of the decoder, such as visual.merger.ln_q.weight"
    assert second.startswith("out/model.safetensors has no places projector_0/bias ")
    again = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(again[name].tobytes() == x.tobytes() for name, x in tensors.items())


@pytest.fixture
def workdir(tmp_path):
    """A work directory with an artefact in it."""
    rng = np.random.default_rng(0)
    card = {
        "dataset": "noise",
        "class_names": ["a", "b"],
        "mean": [0.4, 0.5, 0.6],
        "std": [0.1, 0.2, 0.3],
        "method": "random",
        "ipc": 3,
        "factor": 1,
        "config_hash": "0",
        "seeds": {},
        "accuracies": [],
        "provenance": {},
    }
    images = rng.random((6, 5, 4, 3), np.float32)
    labels = np.array([0, 0, 0, 1, 1, 1], np.int32)
    artifact.save(tmp_path / "artifacts", artifact.Distilled(images, labels, None, card))
    return tmp_path


def test_numpy_reads_an_artefact(workdir, monkeypatch, capsys):
    names = run("read_with_numpy.py", workdir, monkeypatch)
    distilled = artifact.load(workdir / "artifacts")
    wanted = (distilled.images.astype(np.float64) - [0.4, 0.5, 0.6]) / [0.1, 0.2, 0.3]
    assert names["inputs"].dtype == np.float32
    np.testing.assert_allclose(names["inputs"], wanted, rtol=1e-5, atol=1e-5)
    assert capsys.readouterr().out == "noise (6, 5, 4, 3) float32 [3 3]\n"


def test_pytorch_reads_an_artefact(workdir, monkeypatch):
    pytest.importorskip("torch")
    names = run("read_with_pytorch.py", workdir, monkeypatch)
    assert tuple(names["dataset"].tensors[0].shape) == (6, 3, 5, 4)


def test_a_distilled_set_is_read_in_a_work_directory(workdir, monkeypatch, capsys):
    names = run("use_distilled.py", workdir, monkeypatch)
    assert names["distilled"].images.shape == (6, 5, 4, 3)
    assert capsys.readouterr().out == "noise (6, 5, 4, 3) (6,)\n"


@pytest.mark.parametrize("library", ["flax", "equinox"])
def test_networks_of_other_libraries_are_functions_too(library, tmp_path, monkeypatch):
    pytest.importorskip(library)
    name = {"flax": "with_nnx.py", "equinox": "with_equinox.py"}[library]
    names = run(name, tmp_path, monkeypatch)
    images = np.asarray(names["images"])
    assert images.shape == (10, 1, 8, 8, 1) and images.min() >= 0 and images.max() <= 1
    assert np.abs(images - np.asarray(names["matches"][0])).mean() > 0.01


def test_a_method_outside_the_package_runs_resumes_and_leaves_what_others_leave(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(EXAMPLES / "my_method")
    flags = [f"--config={EXAMPLES / 'my_method' / 'my_config.py'}", f"--workdir={tmp_path}"]
    flags += ["--config.method.steps=6", "--config.run.chunk=2", "--config.run.checkpoint_every=2"]
    flags += ["--config.evals.accuracy.epochs=3"]
    with pytest.raises(Interrupted, match="stopped after step"):
        main.run(flags, lambda: True)
    main.run(flags)
    assert "| my_method |" in capsys.readouterr().out
    distilled = artifact.load(tmp_path)
    assert distilled.images.shape == (20, 8, 8, 1) and distilled.card["method"] == "my_method"
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]
    with pytest.raises(InputError, match=r"method\.learning_rate is -1.0; it must be a number"):
        main.run([*flags, "--config.method.learning_rate=-1.0"])
    with pytest.raises(InputError, match=r"unknown setting config\.method\.rates; choose from"):
        main.run([*flags, "--config.method.rates=1.0"])


def test_the_readme_shows_the_library_example():
    code = (EXAMPLES / "library.py").read_text().split('"""\n\n', 1)[1]
    assert code in (EXAMPLES.parent.parent / "README.md").read_text()
