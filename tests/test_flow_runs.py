"""Flow runs from the command line, small: teacher, students, artefacts, resumption, bad input."""

import json
import runpy
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxdistill import config as configs
from jaxdistill import experiment, load_student, main, settings
from jaxdistill.errors import InputError, Interrupted
from jaxdistill.eval import results
from jaxdistill.flow import adapt
from jaxdistill.flow.policies import momentum_policy
from jaxdistill.io import weights
from jaxdistill.nn import lora
from jaxdistill.nn.momentum_head import MomentumHead
from jaxdistill.task import Part
from jaxdistill.tasks import flow
from tests.pages import Page

POINTS = "flow:dataset=soft4,smoke"
IMAGES = "flow:dataset=digits,smoke"
ALONE = f"{IMAGES},baselines="
GUIDED = ["--config.teacher.guidance=1.5"]
EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"
STUDENTS = ("linear", "straight", "gaussian", "endpoint", "endpoint_8x", "progressive")
CALLS = "--config.evals.samples.nfe=(1,2)"


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("flow") / "points"
    main.run([f"--config={POINTS}", f"--workdir={workdir}", CALLS])
    return workdir


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("flow") / "images"
    # Labels, adapters and guidance on top of what points have.
    main.run([f"--config={ALONE}", f"--workdir={workdir}", *GUIDED])
    return workdir


def test_the_report_shows_points_curves_and_the_teacher(points):
    page = Page(points / "report.html")
    assert len(page.pictures) == 2 and "Before that, teacher" in page.text
    names = {row for row in rows_of(points)}
    assert names <= {row[0] for row in page.cells} and len(page.drawings) > 3


def rows_of(workdir):
    """Row -> measure -> value."""
    found = {}
    for record in json.loads((workdir / "results.json").read_text()):
        found.setdefault(record["row"], {})[record["metric"]] = record["value"]
    return found


def timeless(rows):
    """All but seconds, which no run repeats."""
    return {
        name: {k: v for k, v in row.items() if not k.endswith(" s")} for name, row in rows.items()
    }


def test_a_run_leaves_what_it_promises(points):
    params, card = weights.load(points / "artifacts", "student")
    teacher, teacher_card = weights.load(points / "teacher", "teacher")
    assert set(params) == {"trunk", "head"}
    assert card["parameters"] == lora.count(params)
    assert card["provenance"]["teacher_sha256"] == teacher_card["sha256"]
    assert card["nfe"] == 2 and card["shift"] == 3.2 and "licence" in card
    # 8 steps of 8 examples, 2 segments with 4 queries each.
    assert card["cost"]["teacher_queries"] == 8 * 8 * 2 * 4
    for name in ("samples.png", "trajectories.png"):
        assert np.asarray(Image.open(points / "artifacts" / name)).std() > 1
    rows = rows_of(points)
    assert {"arcflow, 1", "arcflow, 2", "linear, 2", "teacher, euler, 2"} <= set(rows)
    assert rows["teacher, midpoint, 2"]["nfe"] == 2
    assert rows["teacher, euler, 4"]["endpoint RMSE"] < rows["teacher, euler, 2"]["endpoint RMSE"]
    assert lora.count(teacher) > 0


@pytest.mark.slow
def test_images_have_all_the_measures(images):
    rows = rows_of(images)
    student = rows["arcflow, 2"]
    assert student["nfe"] == 2
    assert rows["teacher, euler, 2"]["nfe"] == 4  # guidance takes two
    trained, card = weights.load(images / "artifacts", "student")
    # 8 steps of 8 examples, 2 segments with 4 queries of two calls each.
    assert card["cost"]["teacher_queries"] == 8 * 8 * 2 * 4 * 2
    lines = (images / "metrics.jsonl").read_text().splitlines()
    assert {m["queries"] for m in map(json.loads, lines) if "queries" in m} == {2 * 4 * 2}
    wanted = {"FD to data", "FD to teacher", "recall", "class accuracy", "diversity"}
    wanted |= {"FD to data, by turns", "FD to teacher, by turns"}
    assert wanted <= set(student)
    # What nobody generated: without variety, and without new images.
    means, repeated = rows["means of the classes"], rows["training images, each ten times"]
    real = rows["real, training images"]
    assert means["diversity"] < 1e-3 and means["recall"] == 0 and real["recall"] > 0.5
    assert repeated["recall"] < real["recall"]
    assert all(np.isfinite(value) for row in rows.values() for value in row.values())
    leaves = {"/".join(k) for k in _paths(trained["trunk"])}
    layers = [f"{room}/{name}" for room in ("blocks", "condition") for name in ("up", "down")]
    assert leaves == {f"{layer}/lora_{x}" for layer in layers for x in "ab"}


@pytest.mark.slow
def test_the_teachers_images_are_made_once_and_damaged_ones_named(images, tmp_path):
    workdir = shutil.copytree(images, tmp_path / "run")
    args = [f"--config={ALONE}", f"--workdir={workdir}", "--mode=eval", *GUIDED]
    (kept,) = (workdir / "judge").glob("teacher-*.npz")
    stamp = kept.stat().st_mtime_ns
    (workdir / "results.json").unlink()
    main.run(args)
    assert kept.stat().st_mtime_ns == stamp
    assert timeless(rows_of(workdir)) == timeless(rows_of(images))
    np.savez(kept, images=np.zeros(3), ends=np.zeros(3))
    (workdir / "results.json").unlink()
    with pytest.raises(InputError, match=r"teacher-.*npz are not this teacher's images .*delete"):
        main.run(args)


@pytest.mark.parametrize("kind", ["points", pytest.param("images", marks=pytest.mark.slow)])
def test_the_example_of_the_documentation_samples_from_what_a_run_left(kind, request, monkeypatch):
    workdir = request.getfixturevalue(kind)
    monkeypatch.chdir(workdir)
    names = runpy.run_path(str(EXAMPLES / "use_student.py"))
    config = configs.load(POINTS if kind == "points" else ALONE)
    if kind == "images":
        configs.override(config, "teacher.guidance", "1.5")
    ready = experiment.set_up(config, workdir)
    trained, _ = weights.load(workdir / "artifacts", "student")
    frozen = ready.recipes["arcflow"].frozen.load()
    noise = jax.random.normal(jax.random.key(0), (16, *ready.loaded.task.shape))
    wanted = ready.recipes["arcflow"].sample(trained, frozen, noise, names["label"], nfe=2)
    assert np.isfinite(wanted).all()
    np.testing.assert_allclose(names["examples"], wanted, rtol=1e-4, atol=1e-5)


def test_a_student_is_read_wherever_it_lies_and_under_its_own_teacher_alone(points, tmp_path):
    label = np.zeros(4, np.int32)
    key = jax.random.key(0)
    made = load_student(points / "artifacts").sample(key, label)
    np.testing.assert_array_equal(load_student(points).sample(key, label, nfe=2), made)
    assert load_student(points / "baselines" / "linear").sample(key, label).shape == (4, 1, 1, 2)
    assert np.abs(load_student(points).sample(key, label, nfe=1) - made).max() > 1e-4
    moved = shutil.copytree(points / "artifacts", tmp_path / "moved")
    with pytest.raises(InputError, match="no teacher lies beside the student"):
        load_student(moved)
    np.testing.assert_array_equal(load_student(moved, points / "teacher").sample(key, label), made)
    params, card = weights.load(points / "teacher", "teacher")
    weights.save(tmp_path / "other", "teacher", jax.tree.map(lambda x: 2 * x, params), card)
    with pytest.raises(InputError, match="is not that of the student"):
        load_student(moved, tmp_path / "other")
    with pytest.raises(InputError, match=r"labels are whole numbers \(n,\), not float"):
        load_student(points).sample(key, np.zeros(4))


def _paths(tree, prefix=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _paths(value, (*prefix, key))
        else:
            yield (*prefix, key)


def test_the_same_command_does_nothing_twice(points, capsys):
    before = {p: p.stat().st_mtime_ns for p in points.rglob("*.safetensors")}
    args = [f"--config={POINTS}", f"--workdir={points}", CALLS]
    main.run(args)
    assert before == {p: p.stat().st_mtime_ns for p in points.rglob("*.safetensors")}
    assert "| arcflow, 2 " in capsys.readouterr().out
    main.run([*args, "--mode=eval"])
    with pytest.raises(InputError, match="was started with another config"):
        main.run([*args, "--config.method.queries=3"])


def test_stopped_anywhere_it_ends_the_same(points, tmp_path):
    workdir, numbers, stops = tmp_path / "run", np.random.default_rng(0), 0
    config = configs.load(POINTS, {"evals.samples.nfe": "(1,2)"})
    for _ in range(60):
        try:
            experiment.train(config, workdir, lambda: numbers.random() < 0.1)
            break
        except Interrupted:
            stops += 1
    assert 3 < stops < 60
    for part in ("teacher/teacher", "artifacts/student", "baselines/linear/artifacts/student"):
        assert (workdir / f"{part}.safetensors").read_bytes() == (
            points / f"{part}.safetensors"
        ).read_bytes()
    assert timeless(rows_of(workdir)) == timeless(rows_of(points))


def _begun(points, start, **more):
    """DMD2 that begins where another student ended; a discriminator plays along."""
    changes = {"teacher.dir": str(points / "teacher"), "method.start": str(start)}
    config = configs.load("dmd2:smoke,baselines=", changes | more).unlock()
    config.method.adversarial, config.run.chunk = 0.1, 2
    config.evals = {}
    return config


def test_two_players_stopped_anywhere_end_the_same(points, tmp_path):
    config = _begun(points, points / "baselines" / "linear")
    experiment.train(config, tmp_path / "once")
    numbers, stops = np.random.default_rng(0), 0
    for _ in range(60):
        try:
            experiment.train(config, tmp_path / "often", lambda: numbers.random() < 0.5)
            break
        except Interrupted:
            stops += 1
    assert 0 < stops < 60
    one, two = (tmp_path / run / "artifacts/student.safetensors" for run in ("once", "often"))
    assert one.read_bytes() == two.read_bytes()
    begun = weights.load(points / "baselines" / "linear" / "artifacts", "student")[1]
    card = weights.load(tmp_path / "often" / "artifacts", "student")[1]
    assert card["provenance"]["start_sha256"] == begun["sha256"]
    assert load_student(tmp_path / "once").sample(jax.random.key(0), np.zeros(4, int)).shape[0] == 4


def test_a_student_begins_where_another_of_its_teacher_ended(points, tmp_path):
    """Nothing is learned at a rate of 0, so that what is left is where it began."""
    start = shutil.copytree(points / "baselines" / "linear", tmp_path / "start")
    config = _begun(points, start)
    config.method.learning_rate, config.method.steps = 1e-30, 2
    experiment.train(config, tmp_path / "run")
    begun, left = (weights.load(w / "artifacts", "student")[0] for w in (start, tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, begun, left)
    # Where the start is gone, the run goes on with the copy that it keeps.
    shutil.rmtree(start)
    shutil.rmtree(tmp_path / "run" / "artifacts")
    experiment.train(config, tmp_path / "run")
    again, _ = weights.load(tmp_path / "run" / "artifacts", "student")
    jax.tree.map(np.testing.assert_array_equal, begun, again)
    with pytest.raises(InputError, match="start holds no student; give the workdir of a finished"):
        experiment.set_up(config, tmp_path / "new")
    shutil.copytree(points / "baselines" / "linear", start)
    # The same student in another place is the same start; none is another.
    moved = shutil.copytree(start, tmp_path / "moved")
    config.method.start = str(moved)
    experiment.train(config, tmp_path / "run")
    config.method.start = None
    with pytest.raises(InputError, match="start_sha256"):
        experiment.train(config, tmp_path / "run")
    config.method.start = str(start)
    # Another student in the same place is another start.
    params, card = weights.load(start / "artifacts", "student")
    other = jax.tree.map(lambda x: 2 * x, params)
    weights.save(start / "artifacts", "student", other, card)
    with pytest.raises(InputError, match="start_sha256"):
        experiment.train(config, tmp_path / "run")
    weights.save(start / "artifacts", "student", params, card | {"provenance": {}})
    with pytest.raises(InputError, match="is of another teacher; give one of this one"):
        experiment.train(config, tmp_path / "new")
    with pytest.raises(InputError, match=r"the student in .*artifacts"):
        experiment.train(_begun(points, points), tmp_path / "new")  # with other modes
    with pytest.raises(InputError, match="none holds no student; give the workdir of a finished"):
        experiment.set_up(_begun(points, tmp_path / "none"), tmp_path / "new")
    assert not (tmp_path / "new" / "artifacts").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method.alpha": "12.0"}, r"has adapters of method.alpha=12.0, this run's have 3.0"),
        ({"method.unit": "step"}, "has gammas of a step"),
    ],
)
def test_starts_that_would_be_other_functions_are_refused(given, said, tmp_path):
    config = configs.load(f"{ALONE},method=arcflow", given)
    card = {"config": config.to_dict(), "method": "arcflow"}
    with pytest.raises(InputError, match=said):
        flow._check_start(tmp_path, card, 3.0)
    plain = {"config": configs.load(f"{ALONE},method=arcflow").to_dict(), "method": "arcflow"}
    flow._check_start(tmp_path, plain, 3.0)
    with pytest.raises(InputError, match="is not the card of a student of this version"):
        flow._check_start(tmp_path, {}, 3.0)


@pytest.mark.slow
def test_every_student_runs(tmp_path, points):
    config = configs.load(
        f"{POINTS},baselines={'+'.join(STUDENTS)}", {"teacher.dir": str(points / "teacher")}
    )
    experiment.train(config, tmp_path / "run")
    assert {f"{name}, 2" for name in STUDENTS} <= set(rows_of(tmp_path / "run"))
    cards = {
        name: json.loads((tmp_path / "run/baselines" / name / "artifacts/student.json").read_text())
        for name in STUDENTS
    }
    queries = {name: card["cost"]["teacher_queries"] for name, card in cards.items()}
    assert queries["endpoint_8x"] == 8 * queries["endpoint"] == 8 * queries["straight"]


def task_of(config):
    """The task of a config, as shapes."""
    return flow.shapes(settings.resolve(config))


def test_trained_weights_stay_few():
    absent = {"fashion_mnist": (28, 28, 1), "cifar10": (32, 32, 3), "svhn_cropped": (32, 32, 3)}
    for dataset in ("digits", "latents_imagenet", "latents_1mp", *absent):
        resolved = settings.resolve(configs.load(f"flow:dataset={dataset}"))
        if dataset in absent:  # here, or perhaps
            task = flow._images(resolved.groups, dataset, absent[dataset], 10, Part())
        else:
            task = flow.shapes(resolved)
        note = resolved.rows["arcflow"].recipe(task).note
        trained, whole = (int(note.split()[i].replace(",", "")) for i in (0, 2))
        assert trained / whole < 0.05, dataset


def test_a_student_starts_as_its_teacher(points):
    # One straight mode without noise: the student's first call is the teacher's velocity.
    task = task_of(configs.load(POINTS))
    frozen = {"teacher": weights.load(points / "teacher", "teacher")[0]}
    head = MomentumHead(1, 2, 1, curved=False)
    student = adapt.adapted(task, head, momentum_policy(), adapt.Training())
    x = jax.random.normal(jax.random.key(0), (5, 1, 1, 2))
    t, label = jnp.full(5, 0.7), jnp.zeros(5, jnp.int32)
    made = student.apply(student.init(jax.random.key(1), frozen), frozen, x, t, label)
    field = student.policy.begin(made, x, t, jnp.zeros(5))
    teachers = task.trunk.apply({"params": frozen["teacher"]}, x, t, label)
    np.testing.assert_allclose(student.policy.velocity(field, x, t), teachers, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "overrides", "message"),
    [
        (POINTS, ["method.name=magic"], "unknown method 'magic'"),
        (POINTS, ["model.network=rnn"], "must be dit or unet or mlp"),
        (POINTS, ["method.modes=0"], r"method\.modes is 0"),
        (POINTS, ["method.nfe=0"], r"method\.nfe is 0"),
        (POINTS, ["evals.samples.nfe=(2,0)"], "tuple of whole numbers between 1"),
        (POINTS, ["evals.samples.nfe=()"], "give the numbers of network calls"),
        (POINTS, ["teacher.guidance=2.0"], "needs a teacher that knows the null"),
        (POINTS, ["teacher.label_drop=0.1"], "soft4 has no labels to drop"),
        (
            "dmd2:dataset=digits,smoke,baselines=",
            ["method.guidance=2.0", "teacher.label_drop=0.0"],
            "a teacher that knows the null label",
        ),
        (POINTS, ["model.network=dit"], r"model\.network=mlp goes with points"),
        (POINTS, ["method.elastic=(1,2)", "method.from_data=True"], "elastic goes with segments"),
        (
            POINTS,
            ["method.elastic=(1,2)", "method.unit=step"],
            "elastic goes with gammas of a unit",
        ),
        (POINTS, ["method.elastic=(1,2)", "method.last=0.5"], "have even segments"),
        (f"{POINTS},method=progressive", ["method.elastic=(1,2)"], "unknown setting config.method"),
        (POINTS, ["model.widths=('a',)"], "must be a tuple of whole numbers between 1"),
        (IMAGES, ["method.targets=()"], "adapters without targets"),
        (IMAGES, ["method.targets=(1,)"], "must be a tuple of texts"),
        (IMAGES, ["method.targets=('output',)"], "'output' fits no layer"),
        (POINTS, ["method.log_gamma=(1.0,)"], "give the lowest and the highest"),
        (POINTS, ["model.dtype=float33"], "must be float32 or bfloat16"),
        (POINTS, ["data.placement=moon"], "must be resident or streamed"),
        (POINTS, ["evals.samples.nfe=(2.5,)"], "whole numbers"),
        (POINTS, ["evals.samples.teacher_rows=('midpoint:3',)"], "of those of one step: heun:8"),
        (POINTS, ["evals.samples.teacher_rows=('magic:4',)"], "each is a sampler .euler, midpoint"),
        (POINTS, ["evals.samples.teacher_rows=('euler:0',)"], "teacher_rows has 'euler:0'"),
        (POINTS, ["method.clip=0.0"], r"method\.clip is 0"),
        (IMAGES, ["model.network=unet"], "set method.rank=0"),
        (IMAGES, ["teacher.exact=True"], "exact velocity of digits is not known"),
        (IMAGES, ["model.patch=3"], "do not divide into patches of 3"),
        (IMAGES, ["model.width=30"], r"model\.width is 30; it must be a multiple of 4"),
        (IMAGES, ["method.targets=('nowhere',)"], "'nowhere' fits no layer"),
        (f"{IMAGES},method=progressive", ["method.first_nfe=5"], "power of two"),
        (POINTS, ["teacher.dir=/nowhere"], r"/nowhere holds no teacher\.safetensors"),
        ("flow:dataset=latents_1mp", [], "a shape without data"),
    ],
)
def test_bad_input_is_told_in_one_line(spec, overrides, message, tmp_path):
    args = [f"--config.{o}" for o in overrides]
    with pytest.raises(InputError, match=message) as caught:
        main.run([f"--config={spec}", f"--workdir={tmp_path / 'run'}", *args])
    assert "\n" not in str(caught.value)
    assert not list((tmp_path).rglob("*.safetensors"))


def test_a_teacher_of_other_data_is_refused(points, tmp_path):
    args = [f"--config.teacher.dir={points / 'teacher'}", f"--workdir={tmp_path / 'run'}"]
    with pytest.raises(InputError, match=r"trained with data\.name=soft4, this run has ring8"):
        main.run(["--config=flow:dataset=ring8,smoke", *args])


@pytest.mark.slow
def test_a_teacher_of_other_pixels_is_refused(images, tmp_path):
    args = [f"--config.teacher.dir={images / 'teacher'}", f"--workdir={tmp_path / 'run'}"]
    with pytest.raises(InputError, match=r"trained with data\.pad_to=None, this run has 12"):
        main.run([f"--config={ALONE}", "--config.data.pad_to=12", *GUIDED, *args])


def test_the_gammas_have_a_rate_of_their_own():
    tx = adapt.optimizer(adapt.Training(steps=100), gamma_rate_scale=0.1)
    ones = {"head": {n: {"kernel": jnp.ones(3)} for n in ("velocities", "log_gammas")}}
    updates, _ = tx.update(ones, tx.init(ones), ones)  # Adam's first: the rate, whatever the size
    head = jax.tree.map(lambda x: float(x[0]), updates["head"])
    np.testing.assert_allclose(
        head["log_gammas"]["kernel"], 0.1 * head["velocities"]["kernel"], rtol=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "overrides"),
    [
        (POINTS, {"method.unit": "step", "method.from_data": "True", "method.last": "0.5"}),
        (IMAGES, {"model.network": "unet", "method.rank": "0", "model.widths": "(8, 16)"}),
    ],
)
def test_other_settings_run(spec, overrides, tmp_path):
    overrides = {"evals.samples.teacher_rows": "()", **overrides}
    experiment.train(configs.load(f"{spec},baselines=", overrides), tmp_path / "run")
    assert all(np.isfinite(v) for v in rows_of(tmp_path / "run")["arcflow, 2"].values())
    # Drawn beside the teacher even where it has no row.
    assert (tmp_path / "run/artifacts/samples.png").is_file()


def test_a_half_trained_student_goes_on_under_its_own_teacher_alone(points, tmp_path):
    other, workdir = tmp_path / "teacher", tmp_path / "run"
    params, card = weights.load(points / "teacher", "teacher")
    weights.save(other, "teacher", jax.tree.map(lambda x: 1.01 * x, params), card)
    config = configs.load(POINTS, {"teacher.dir": str(points / "teacher")})
    with pytest.raises(Interrupted, match="stopped after step 4 of 8"):
        experiment.train(config, workdir, lambda: True)
    configs.override(config, "teacher.dir", str(other))
    with pytest.raises(InputError, match=r"another config \(teacher_sha256="):
        experiment.train(config, workdir)


def test_a_teacher_of_another_network_is_refused(points, tmp_path):
    args = [f"--config.teacher.dir={points / 'teacher'}", "--config.model.width=64"]
    with pytest.raises(InputError, match="the config's network"):
        main.run([f"--config={POINTS}", f"--workdir={tmp_path / 'run'}", *args])


def test_evaluating_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no student\.safetensors"):
        main.run([f"--config={POINTS}", f"--workdir={tmp_path}", "--mode=eval"])


def test_damaged_results_are_named(points):
    path = points / "results.json"
    before = path.read_bytes()
    try:
        path.write_text('{"rows": 3}')
        with pytest.raises(InputError, match=r"results\.json is not a list of results"):
            results.read(path)
    finally:
        path.write_bytes(before)
