"""The whole way, small: config, distillation, artefact, evaluation, resumption, and bad input."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from jaxdistill import config as configs
from jaxdistill import experiment, main, runner
from jaxdistill.errors import InputError
from jaxdistill.io import artifact
from jaxdistill.parallel.mesh import make_mesh

SMOKE = "ncfm:dataset=digits,ipc=2,smoke"
WITH = f"{SMOKE},baselines=random+start"
ALONE = f"{SMOKE},baselines="
TINY = (
    "--config.extractor.depth=1",
    "--config.evals.accuracy.depth=1",
    "--config.pool.epochs=1",
    "--config.evals.accuracy.epochs=4",
    "--config.evals.accuracy.seeds=2",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A workdir after one complete run."""
    workdir = tmp_path_factory.mktemp("train") / "run"
    main.run([f"--config={WITH}", f"--workdir={workdir}", *TINY])
    return workdir


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_dry_run_says_what_is_there_and_makes_nothing(finished, tmp_path, capsys):
    before = files(finished)
    main.run([f"--config={WITH}", f"--workdir={finished}", *TINY, "--dry_run"])
    said = capsys.readouterr().out
    assert said.count("| finished ") == 3 and "accuracy (classify)" in said
    assert "FLOPs a step" in said and "if all were one large product" in said
    assert files(finished) == before
    fresh = tmp_path / "fresh"
    main.run([f"--config={WITH}", f"--workdir={fresh}", *TINY, "--dry_run"])
    assert capsys.readouterr().out.count("| nothing ") == 3 and not fresh.exists()
    with pytest.raises(InputError, match="was started with another config"):
        main.run(
            [f"--config={WITH}", f"--workdir={finished}", *TINY, "--dry_run", "--config.seed=1"]
        )


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of that workdir, to be spoiled."""
    return shutil.copytree(finished, tmp_path / "copy")


def test_a_finished_workdir_is_what_it_says(copied, capsys):
    before = files(copied)
    main.run(["--mode=verify", f"--workdir={copied}"])
    said = capsys.readouterr().out
    assert said.count("| whole, of settings ") == 3 and files(copied) == before
    with pytest.raises(InputError, match="and nothing else"):
        main.run(["--mode=verify", f"--workdir={copied}", "--config=ncfm"])
    with pytest.raises(InputError, match=r"holds no config\.json"):
        main.run(["--mode=verify", f"--workdir={copied / 'pool'}"])


def _exchange(folder):
    """The artefact of another row, whole in itself."""
    shutil.rmtree(folder / "artifacts")
    shutil.copytree(folder / "baselines" / "start" / "artifacts", folder / "artifacts")


def _alter(folder):
    path = folder / "artifacts" / "distilled.json"
    card = json.loads(path.read_text())
    card["settings"]["method"]["learning_rate"] = 7.0
    path.write_text(json.dumps(card))


def _spoil(folder):
    path = folder / "artifacts" / "distilled.npz"
    arrays = dict(np.load(path))
    arrays["images"][0, 0, 0, 0] = 1 - arrays["images"][0, 0, 0, 0] / 2
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_exchange, "its card is of other settings"),
        (_alter, "its card is of other settings"),
        (_spoil, "content_sha256 differs"),
    ],
)
def test_what_is_not_what_it_says_is_found(copied, capsys, spoil, said):
    spoil(copied)
    with pytest.raises(InputError, match=r"^ncfm in .* is not what it says; see the table above"):
        main.run(["--mode=verify", f"--workdir={copied}"])
    table = capsys.readouterr().out
    assert said in table and table.count("| whole, of settings ") == 2


def test_a_run_leaves_what_it_promises(finished):
    distilled = artifact.load(finished / "artifacts")
    assert distilled.images.shape == (20, 8, 8, 1)
    np.testing.assert_array_equal(distilled.labels, np.repeat(np.arange(10), 2))
    card = distilled.card
    assert (card["method"], card["dataset"], card["ipc"], card["factor"]) == (
        "ncfm",
        "digits",
        2,
        1,
    )
    assert len(card["accuracies"]) == 2
    assert len(card["provenance"]["source_sha256"]) == 64
    for name in ("config.json", "versions.json", "metrics.jsonl", "results.json"):
        assert (finished / name).stat().st_size > 0
    assert list((finished / "checkpoints").iterdir())
    assert (finished / "artifacts" / "distilled.png").is_file()
    start = artifact.load(finished / "baselines" / "start" / "artifacts")
    real = load_digits().images[:1437] / 16
    gaps = np.abs(start.images[..., 0][:, None] - real).max((2, 3)).min(1)
    assert gaps.max() < 1 / 255  # the start is made of real images
    assert np.abs(distilled.images - start.images).max() > 0.01  # the distilled set is not


def test_results_are_of_every_method_and_seed(finished):
    records = json.loads((finished / "results.json").read_text())
    found = {(r["row"], r["seed"]) for r in records}
    assert found == {(m, s) for m in ("ncfm", "random", "start") for s in (0, 1)}
    assert all(0 <= r["value"] <= 1 for r in records)
    assert {r["metric"] for r in records} == {"convnet, hard labels"}


def test_the_same_command_does_nothing_twice(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    before = files(tmp_path / "run")
    main.run([f"--config={WITH}", f"--workdir={tmp_path / 'run'}", *TINY])
    assert files(tmp_path / "run") == before
    assert "| ncfm" in capsys.readouterr().out


def test_a_lost_artefact_comes_back_in_the_same_bits(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "artifacts")
    main.run([f"--config={WITH}", f"--workdir={tmp_path / 'run'}", *TINY])
    again, first = (artifact.load(d / "artifacts") for d in (tmp_path / "run", finished))
    np.testing.assert_array_equal(again.images, first.images)


def test_eval_adds_soft_labels_beside_hard_ones(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    flags = [*TINY, "--config.evals.accuracy.soft_labels=true"]
    main.run([f"--config={ALONE}", f"--workdir={tmp_path / 'run'}", "--mode=eval", *flags])
    table = capsys.readouterr().out
    assert "convnet, hard labels | convnet, soft labels" in table
    kinds = [r["metric"] for r in json.loads((tmp_path / "run" / "results.json").read_text())]
    assert (kinds.count("convnet, soft labels"), kinds.count("convnet, hard labels")) == (2, 6)


def test_a_run_can_start_from_an_artefact(finished, tmp_path):
    """One step at a rate of zero: what comes out is what went in."""
    file = finished / "artifacts" / "distilled.npz"
    flags = [f"--config.method.start={file}", "--config.method.learning_rate=0.0"]
    flags += [f"--config.pool.dir={finished / 'pool'}", "--config.method.steps=1", *TINY]
    main.run([f"--config={ALONE}", f"--workdir={tmp_path}", *flags])
    again, first = (artifact.load(d / "artifacts") for d in (tmp_path, finished))
    np.testing.assert_array_equal(again.images, first.images)
    with pytest.raises(InputError, match="starts from 3 of shape"):
        main.run([f"--config={ALONE}", f"--workdir={tmp_path / 'b'}", *flags,
                  "--config.method.ipc=3"])  # fmt: skip


@pytest.mark.slow
def test_ncfm_resumes_bitwise(finished, tmp_path):
    """Everything that NCFM can keep in its state, interrupted between two checkpoints."""
    changes = {
        "extractor.depth": "1",
        "method.sampler": "learned",
        "method.warmup": "1",
        "method.finetune_learning_rate": "0.01",
        "method.calibration": "1.0",
        "pool.dir": str(finished / "pool"),
        "pool.epochs": "1",
    }
    ready = experiment.set_up(configs.load(SMOKE, changes), tmp_path / "setup")
    method, frozen = ready.recipes["ncfm"].method, ready.recipes["ncfm"].frozen.load()
    data = ready.loaded.task.examples.load()
    options = {"data": data, "frozen": frozen, "key": jax.random.key(0), "steps": 5}
    options["mesh"] = make_mesh(jax.devices()[:1])

    def stop(step, state):
        if step >= 4:
            raise KeyboardInterrupt

    whole = runner.run(method, chunk=5, workdir=tmp_path / "whole", **options)
    parts = {"chunk": 1, "workdir": tmp_path / "parts", "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        runner.run(method, on_chunk=stop, **parts, **options)
    resumed = runner.run(method, **parts, **options)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    assert float(np.abs(jax.tree.leaves(whole.sampler)[0]).max()) > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=nope"], "no config 'nope'"),
        (["--config=ncfm:dataste=digits"], "unknown config argument 'dataste=digits'"),
        (["--config=ncfm:ipc=many"], "must be of type int"),
        (["--config=ncfm", "--config.method.ipcs=1"], "unknown setting config.method.ipcs"),
        (["--config=ncfm", "--config.method.learning_rate=fast"], "is 'fast'; it must be a number"),
        (["--config=ncfm", "--config.method.rate=0.1"], "is now called method.learning_rate"),
        (["--config=ncfm", "--config.run.steps=5"], "is now called method.steps"),
        (["--config=ncfm", "--config.model.width=5"], "is now called"),
        (["--config=ncfm", "--config.eval.seeds=2"], "is now called evals"),
        (["--config=ncfm", "--config.method.name=magic"], "unknown method 'magic'"),
        (
            ["--config=ncfm", "--config.method.sampler=magic"],
            "must be gaussian or learned or released",
        ),
        (["--config=ncfm", "--config.method.objective=magic"], "must be ratio or gap or excess"),
        (["--config=ncfm", "--config.method.start=magic"], "unknown start 'magic'"),
        (["--config=ncfm", "--config.parallel.backend=magic"], "must be jit or pmap"),
        (
            ["--config=ncfm", "--config.evals.accuracy.strategy=magic"],
            "unknown augmentation 'magic'",
        ),
        (
            ["--config=ncfm", '--config.evals.accuracy.networks=("magic",)'],
            "unknown network 'magic'",
        ),
        (["--config=ncfm", "--config.method.factor=3"], "factor=3 does not divide"),
        (
            ["--config=ncfm", "--config.method.ipc=0"],
            "method.ipc is 0; it must be a whole number between 1",
        ),
        (
            ["--config=ncfm", "--config.pool.size=0"],
            "pool.size is 0; it must be a whole number between",
        ),
        (["--config=ncfm", "--config.method.steps=-1"], "method.steps is -1; it must be a whole"),
        (["--config=ncfm", "--config.run.microbatch=0"], "run.microbatch is 0; it must be a whole"),
        (["--config=ncfm", "--config.evals.accuracy.seeds=99999999"], "between 1 and 1000"),
        (["--config=ncfm", "--config.evals.accuracy.networks=()"], "give at least one network"),
        (["--config=ncfm", "--config.data.placement=magic"], "must be resident or streamed"),
        (["--config=ncfm:seed=-1"], "seed is -1; it must be a whole number between"),
        (["--config=ncfm:ipc=150"], "class '8' has 141 training images"),
        (["--config=ncfm", "--config.method.batch_real=200"], "asks for 200"),
        (["--config=ncfm:dataset=./missing"], "no such folder"),
        (["--config=ncfm", "--mode=fly"], "mode"),
        (["--config=ncfm", "extra"], "unexpected argument 'extra'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(flags, message, tmp_path):
    with pytest.raises(InputError) as error:
        main.run([*flags, f"--workdir={tmp_path / 'run'}"])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_another_config_is_refused_and_named(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    before = files(tmp_path / "run")
    with pytest.raises(InputError, match=r"method\.learning_rate=0\.02, now 0\.5"):
        main.run([f"--config={WITH}", f"--workdir={tmp_path / 'run'}", *TINY,
                  "--config.method.learning_rate=0.5"])  # fmt: skip
    assert files(tmp_path / "run") == before


def test_eval_needs_a_run(tmp_path):
    with pytest.raises(InputError, match="run --mode=train"):
        main.run([f"--config={SMOKE}", f"--workdir={tmp_path}", "--mode=eval"])


def test_images_of_unequal_size_are_refused(tmp_path):
    for split in ("train", "test"):
        for name, size in (("a", 8), ("b", 9)):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            Image.fromarray(np.zeros((size, size), np.uint8)).save(folder / "x.png")
    with pytest.raises(InputError, match=r"data\.image_size"):
        main.run([f"--config=ncfm:dataset={tmp_path / 'images'}", f"--workdir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_a_damaged_artefact_is_refused(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "artifacts" / "distilled.npz").write_bytes(b"not an archive")
    with pytest.raises(InputError, match="not a jaxdistill artefact"):
        main.run([f"--config={SMOKE}", f"--workdir={tmp_path / 'run'}", "--mode=eval", *TINY,
                  "--config.evals.accuracy.seeds=3"])  # fmt: skip


def test_the_command_prints_one_line_and_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["jaxdistill", "--config=nope", f"--workdir={tmp_path}"])
    with pytest.raises(SystemExit) as stop:
        main.cli()
    assert str(stop.value.code).startswith("jaxdistill: no config 'nope'")


@pytest.mark.parametrize("ipc", [1, 10, 50])
@pytest.mark.parametrize(
    "dataset",
    ["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet", "imagenette"],
)
def test_every_recipe_loads_and_fits_its_images(dataset, ipc):
    config = configs.load(f"ncfm:dataset={dataset},ipc={ipc}")
    side = config.data.image_size or {"digits": 8, "mnist": 28, "fashion_mnist": 28}.get(
        dataset, 32
    )
    assert side % config.method.factor == 0
    assert side >= 2**config.extractor.depth == 2**config.evals.accuracy.depth
    assert config.method.steps % config.run.chunk == 0


BUDGETS = (3, 3, 3, 2, 2, 2, 1, 1, 1, 2)
FEWER = (2, 2, 2, 2, 2, 1, 1, 1, 1, 1)


@pytest.fixture(scope="module")
def tail(tmp_path_factory):
    """Digits of which the first class has 140 and the last 3."""
    path = tmp_path_factory.mktemp("tail") / "tail.npz"
    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)
    sizes = np.rint(140 * 50 ** (-np.arange(10) / 9)).astype(int)
    own = [np.flatnonzero(labels[:1437] == c)[:n] for c, n in enumerate(sizes)]
    train = np.sort(np.concatenate(own))
    np.savez(
        path,
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[1437:],
        test_labels=labels[1437:],
    )
    return path


def test_a_long_tail_is_condensed_with_budgets_of_its_own(tail, tmp_path, capsys):
    """By a method that draws more of each class than the rare ones have, and by a coreset."""
    spec = "ncfm:ipc=1,baselines=herding,smoke"
    flags = [f"--config.data.name={tail}", "--config.method.factor=1", *TINY]
    flags += [f"--config.method.ipc={FEWER}", f"--config.baselines.herding.ipc={BUDGETS}"]
    main.run([f"--config={spec}", f"--workdir={tmp_path}", *flags])
    told = capsys.readouterr().out
    assert "4 of 10 classes have fewer than the 16 images that a step draws of each" in told
    assert "by class" in told and "rarest third" in told
    learned = artifact.load(tmp_path / "artifacts")
    np.testing.assert_array_equal(learned.labels, np.repeat(np.arange(10), FEWER))
    herded = artifact.load(tmp_path / "baselines" / "herding" / "artifacts")
    np.testing.assert_array_equal(herded.labels, np.repeat(np.arange(10), BUDGETS))
    assert herded.card["counts"] == list(BUDGETS) and herded.card["ipc"] == 3
    with np.load(tail) as real:
        assert len({image.tobytes() for image in herded.images}) == sum(BUDGETS)
        for image, label in zip(herded.images, herded.labels, strict=True):
            gaps = np.abs(real["train_images"] / 255 - image).max((1, 2, 3))
            assert gaps.min() < 1e-6 and real["train_labels"][gaps.argmin()] == label
    # The same command finds what it made.
    before = files(tmp_path)
    main.run([f"--config={spec}", f"--workdir={tmp_path}", *flags])
    assert files(tmp_path) == before
    records = json.loads((tmp_path / "results.json").read_text())
    rows = capsys.readouterr().out.splitlines()
    for name in ("ncfm", "herding"):
        line = [r for r in rows if r.startswith(f"| {name} ")][-1]
        thirds = [100 * np.mean(r["classes"][7:]) for r in records if r["row"] == name]
        assert line.split("|")[5].strip() == f"{np.mean(thirds):.1f} ± {np.std(thirds):.1f}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["herding", "(1, 2)"], "ipc has 2 numbers, and tail 10 classes; give one number"),
        (["random", "(1, 1, 1, 1, 1, 1, 1, 1, 1, 4)"], "class '9' has 3 training images"),
        (["random", "(1, 0, 1, 1, 1, 1, 1, 1, 1, 1)"], "between 1 and 10000, or a tuple of such"),
        (["gradient", "(1, 1, 1, 1, 1, 1, 1, 1, 1, 1)"], "must be a whole number between 1 and"),
        (
            ["dm", "4"],
            "a tiled start with ipc=4, factor=2 asks for 16; lower ipc or factor, or start",
        ),
    ],
)
def test_budgets_that_cannot_be_are_refused(flags, message, tail, tmp_path):
    method, ipc = flags
    with pytest.raises(InputError) as error:
        main.run(
            [
                f"--config=ncfm:method={method},baselines=,smoke",
                f"--config.data.name={tail}",
                f"--config.method.ipc={ipc}",
                f"--workdir={tmp_path / 'run'}",
            ]
        )
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
