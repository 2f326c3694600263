"""The assessment of a data set with planted faults, its report, and what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from jaxdistill import config as configs
from jaxdistill import experiment
from jaxdistill.data import sources
from jaxdistill.data.augment import normalizer
from jaxdistill.errors import InputError, Interrupted
from jaxdistill.eval import assess, dynamics, train_on
from jaxdistill.io.reading import read_npz
from jaxdistill.nn.classifiers import classifier

FLIPPED, EQUAL, NEAR, LEAKED = 40, 4, 4, 3


def planted(path):
    """Digits with wrong labels, a long tail, and copies within the training split and across."""
    rng = np.random.default_rng(0)
    digits = load_digits()
    images = np.round(digits.images[..., None] * 255 / 16).astype(np.uint8)
    labels = digits.target.astype(np.int32)
    test = np.arange(1437, len(labels))
    # Of the last two classes there are 20 and 9.
    kept = [np.flatnonzero(labels[:1437] == c)[: {8: 20, 9: 9}.get(c)] for c in range(10)]
    train = np.sort(np.concatenate(kept))
    x, y = images[train], labels[train].copy()
    flipped = rng.choice(np.flatnonzero(y < 8), FLIPPED, replace=False)
    y[flipped] = (y[flipped] + rng.integers(1, 8, FLIPPED)) % 8
    copied = rng.choice(np.setdiff1d(np.flatnonzero(y < 8), flipped), EQUAL + NEAR, replace=False)
    noise = rng.integers(-8, 9, (NEAR, 8, 8, 1))
    near = np.clip(x[copied[EQUAL:]].astype(int) + noise, 0, 255).astype(np.uint8)
    again = np.concatenate([x[copied[:EQUAL]][:, :, ::-1], near])
    leaked = np.concatenate([images[test], x[copied[:LEAKED]]])
    np.savez(
        path,
        train_images=np.concatenate([x, again]),
        train_labels=np.concatenate([y, y[copied]]),
        test_images=leaked,
        test_labels=np.concatenate([labels[test], y[copied[:LEAKED]]]),
    )
    return flipped, copied


def config_of(path, **changes):
    """The smallest that still knows digits from each other."""
    changes = {"epochs": "10", **changes}
    overrides = {f"evals.assessment.{name}": value for name, value in changes.items()}
    return configs.load(
        "assess:ipc=5,smoke",
        {"data.name": str(path), "extractor.depth": "1", "extractor.width": "16"} | overrides,
    )


@pytest.fixture(scope="module")
def assessed(tmp_path_factory):
    """A finished run on planted data: its folder, its records, and what was planted."""
    folder = tmp_path_factory.mktemp("assess")
    flipped, copied = planted(folder / "planted.npz")
    records = experiment.train(config_of(folder / "planted.npz"), folder / "run")
    return folder, records, flipped, copied


def report_of(folder):
    return json.loads((folder / "run" / "assessment" / "assessment.json").read_text())


def scores_of(folder):
    path = folder / "run" / "assessment" / "scores.npz"
    return read_npz(path, [*assess.Scores._fields, "doubtful", "copies"])


def test_wrong_labels_are_found(assessed):
    """Measured here: 0.95 of the 40 most suspicious. Chance is 0.04; the floor leaves four more to
    other versions and machines, which round otherwise.
    """
    folder, _, flipped, _ = assessed
    scores = scores_of(folder)
    first = np.argsort(-scores["suspicion"], kind="stable")[:FLIPPED]
    assert np.isin(first, flipped).mean() >= 0.85
    # Few are doubted without reason, but for the classes that hardly anyone has seen.
    labels = sources.load(folder / "planted.npz").train.labels
    doubted = np.flatnonzero(scores["doubtful"] & (labels < 8))
    assert np.isin(doubted, flipped).mean() >= 0.85
    assert np.isin(flipped, doubted).mean() >= 0.6


def test_copies_are_found_within_and_across_splits(assessed):
    folder, _, _, copied = assessed
    report, train = report_of(folder), len(sources.load(folder / "planted.npz").train.labels)
    added = train - EQUAL - NEAR
    found = {tuple(pair) for pair in scores_of(folder)["copies"].tolist()}
    expected = {(int(c), added + i) for i, c in enumerate(copied)}
    tests = report["images"]["test"]
    expected |= {(int(c), train + tests - LEAKED + i) for i, c in enumerate(copied[:LEAKED])}
    assert expected <= found
    assert report["copies"]["train"]["exact"] == EQUAL
    assert report["copies"]["train"]["near"] >= NEAR
    assert report["copies"]["train_and_test"]["exact"] == LEAKED
    first = report["copies"]["pairs"][0]
    assert first["exact"] and first["part"] == 0 and first["first"]["split"] == "train"


def test_the_report_says_what_there_is(assessed):
    folder, records, _, _ = assessed
    data, report = sources.load(folder / "planted.npz"), report_of(folder)
    counts = np.bincount(data.train.labels)
    assert report["format"] == "jaxdistill.assessment/1"
    assert [c["images"] for c in report["classes"]] == counts.tolist()
    assert report["balance"]["ratio"] == counts.max() / counts.min()
    for name in ("overall", "mean_over_classes"):
        budget = np.array(report["budgets"][name])
        assert budget.sum() == 50 and (budget >= 1).all() and (budget <= counts).all()
    # Rare classes get more where all classes count alike.
    rare = [sum(report["budgets"][n][8:]) for n in ("overall", "mean_over_classes")]
    assert rare[0] < rare[1]
    single = scores_of(folder)
    for label, one in enumerate(report["classes"]):
        own = np.flatnonzero(data.train.labels == label)
        assert one["usable"] <= one["images"] - one["doubtful_labels"]
        np.testing.assert_allclose(one["el2n"], single["el2n"][own].mean(), rtol=1e-5)
        for name in ("suspicious", "easiest", "hardest"):
            assert set(one[name]) <= set(own.tolist()) and len(one[name]) <= 16
        best = single["suspicion"][own].max()
        assert single["suspicion"][one["suspicious"][0]] == best
        assert not single["doubtful"][one["hardest"]].any()
        assert single["el2n"][one["easiest"]].max() <= np.sort(single["el2n"][own])[15:16].max(
            initial=np.inf if len(own) < 16 else 0
        )
    values = {r["metric"]: r["value"] for r in records}
    assert values["images"] == len(data.train.labels)
    assert values["copies in test"] == LEAKED
    assert 0.5 < values["unseen accuracy"] < 1
    text = (folder / "run" / "assessment" / "assessment.md").read_text()
    assert f"{report['labels']['doubtful']} labels are doubtful" in text
    for name in ("suspicious", "hardest", "easiest", "copies"):
        assert f"({name}.png)" in text
        assert (folder / "run" / "assessment" / f"{name}.png").stat().st_size > 0


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_same_command_does_nothing_twice(assessed, tmp_path):
    folder = assessed[0]
    shutil.copytree(folder / "run", tmp_path / "run")
    before = files(tmp_path / "run")
    experiment.train(config_of(folder / "planted.npz"), tmp_path / "run")
    assert files(tmp_path / "run") == before


def test_a_lost_report_comes_back_from_the_networks_kept(assessed, tmp_path):
    folder = assessed[0]
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run" / "assessment" / "assessment.json").unlink()
    (tmp_path / "run" / "assessment" / "scores.npz").unlink()
    kept = files(tmp_path / "run" / "assessment" / "networks")
    experiment.train(config_of(folder / "planted.npz", ipc="3"), tmp_path / "run")
    assert files(tmp_path / "run" / "assessment" / "networks") == kept
    again, first = report_of(tmp_path), report_of(folder)
    assert again["budgets"]["total"] == 30 and first["budgets"]["total"] == 50
    assert again["classes"] == first["classes"]
    for name, values in scores_of(folder).items():
        np.testing.assert_array_equal(scores_of(tmp_path)[name], values)


def test_a_damaged_judgement_is_refused(assessed, tmp_path):
    folder = assessed[0]
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run" / "assessment" / "assessment.json").unlink()
    one = next((tmp_path / "run" / "assessment" / "networks").glob("*-0.npz"))
    arrays = read_npz(one, dynamics.Judgement._fields)
    np.savez(one, **arrays | {"margin": arrays["margin"][:-1]})
    with pytest.raises(InputError, match=r"no judgement of this run .*; delete it"):
        experiment.train(config_of(folder / "planted.npz"), tmp_path / "run")


def test_it_stops_when_asked_and_keeps_the_networks_that_are_done(assessed, tmp_path):
    folder = assessed[0]
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run" / "assessment" / "assessment.json").unlink()
    networks = tmp_path / "run" / "assessment" / "networks"
    next(networks.glob("*-1.npz")).unlink()
    with pytest.raises(Interrupted, match="1 of 2 networks are done"):
        experiment.train(config_of(folder / "planted.npz"), tmp_path / "run", lambda: True)
    assert len(list(networks.iterdir())) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "magic"}, "unknown augmentation 'magic'"),
        ({"ipc": "500"}, "asks for 5000 images in all"),
        ({"near": "2"}, "near is 2; it must be a number between 0 and 1"),
        ({"runs": "0"}, "runs is 0; it must be a whole number between 1 and 100"),
    ],
)
def test_what_cannot_be_is_refused_beforehand(changes, message, assessed, tmp_path):
    with pytest.raises(InputError, match=message):
        experiment.train(config_of(assessed[0] / "planted.npz", **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_handful_of_images_is_assessed(tmp_path):
    """Five of two classes, one of which has a single image, which is in the test split too."""
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    labels = np.array([0, 0, 1, 0, 0])
    np.savez(
        tmp_path / "few.npz",
        train_images=images,
        train_labels=labels,
        test_images=images[2:3],
        test_labels=labels[2:3],
    )
    config = configs.load(
        "assess:ipc=1,smoke",
        {"data.name": str(tmp_path / "few.npz"), "extractor.network": "mlp"},
    )
    values = {r["metric"]: r["value"] for r in experiment.train(config, tmp_path / "run")}
    assert (values["images"], values["copies"], values["copies in test"]) == (5, 0, 1)
    report = report_of(tmp_path)
    assert [c["images"] for c in report["classes"]] == [4, 1]
    assert report["budgets"]["overall"] == report["budgets"]["mean_over_classes"] == [1, 1]
    assert report["classes"][1]["gradient_variance"] == 0


def test_folds_are_halves_of_every_class():
    labels = np.random.default_rng(1).permutation(np.repeat([0, 1, 2, 3], [31, 8, 1, 61]))
    fold = dynamics.folds(labels, 5)
    assert abs(np.ptp(np.bincount(fold))) <= 1
    for label in range(4):
        each = np.bincount(fold[labels == label], minlength=2)
        assert abs(each[0] - each[1]) <= 1
    assert (fold != dynamics.folds(labels, 6)).any()


def test_an_observed_network_is_the_one_that_is_not_observed():
    """The same bits, across a fall of the learning rate; and what is seen is seen each epoch."""
    data = sources.load("digits")
    images, labels = data.train.images[:90], data.train.labels[:90]
    net = classifier("mlp", 10, (8, 8, 1))
    network = train_on.Network(net.init, net.logits)
    protocol = train_on.Protocol(4, 32, 0.05, strategy="none")
    options = {"normalize": normalizer(data.mean, data.std), "protocol": protocol}
    targets = train_on.one_hot(labels, 10)
    args = jax.random.key(3), network, jax.numpy.asarray(images), targets
    told = []
    params, seen = train_on.train_observed(
        *args, lambda params, scale: scale * params["hidden_0"]["bias"][0], 2.0,
        on_epoch=told.append, **options,
    )  # fmt: skip
    whole = train_on.train(*args, **options)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    assert told == [1, 2, 3, 4]
    assert seen.shape == (4,) and len(np.unique(seen)) == 4
    np.testing.assert_allclose(seen[-1], 2 * params["hidden_0"]["bias"][0])
