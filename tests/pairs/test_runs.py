"""Runs of the family: what they leave, what they retrieve, and what they refuse."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdistill
from jaxdistill import config as configs
from jaxdistill import look
from jaxdistill.data.hashed import hashed
from jaxdistill.errors import Diverged, InputError
from jaxdistill.eval import retrieval, train_pairs
from jaxdistill.io import pairs
from tests.pages import Page

SPEC = "pairs:smoke,baselines=random"
# Of one layer, to compile in a second.
SMALL = {"observer.network": "mlp", "evals.retrieval.network": "mlp", "observer.size": "1"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("pairs")
    return workdir, jaxdistill.train(configs.load(SPEC, SMALL), workdir)


def test_a_run_leaves_pairs_that_can_be_used_without_it(run):
    workdir, records = run
    made = pairs.load(workdir)
    assert made.images.shape == (8, 16, 16, 1) and made.texts.shape == (8, 64)
    assert made.similarity is None and made.card["encoder"] == {"name": "hashed", "dim": 64}
    assert len(made.card["captions"]) == 8 and made.card["captions"][0].startswith("top row")
    chosen = pairs.load(workdir / "baselines" / "random")
    # What is shown beside a real pair is its own sentence.
    np.testing.assert_allclose(chosen.texts, hashed(chosen.card["captions"], 64), atol=1e-6)
    assert (workdir / "artifacts" / "retrieval.png").is_file()
    rows = {record["row"] for record in records}
    assert rows == {"covariance", "random", "all pairs"}
    assert {record["metric"] for record in records} == set(retrieval.METRICS)
    assert all(0 <= record["value"] <= 1 for record in records)


def test_the_report_shows_both_rows_and_what_was_retrieved(run):
    page = Page(run[0] / "report.html")
    assert page.pictures and {"covariance", "random"} <= {c for row in page.cells for c in row}


def test_a_workdir_is_what_it_says(run):
    assert look.verify(run[0]).count("| whole, of settings") == 2


def test_what_is_done_is_not_done_again(run, monkeypatch):
    workdir, records = run

    def fail(*args, **kwargs):
        raise AssertionError("something is trained")

    monkeypatch.setattr(train_pairs, "train", fail)
    assert jaxdistill.train(configs.load(SPEC, SMALL), workdir) == records


def test_other_pairs_are_another_run(run):
    config = configs.load(SPEC, SMALL | {"method.pairs": "9"})
    with pytest.raises(InputError, match=r"method\.pairs=8, now 9"):
        jaxdistill.train(config, run[0])


def test_a_run_of_more_pairs_than_images_says_so(tmp_path):
    config = configs.load(SPEC, SMALL | {"method.pairs": "61"})
    with pytest.raises(InputError, match=r"60 training images, but pairs=61"):
        jaxdistill.train(config, tmp_path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"evals.retrieval.network": "vit"}, "unknown network 'vit'; choose from convnet"),
        ({"evals.retrieval.strategy": "spin"}, "spin"),
        ({"text.encoder": "none.npy"}, "none.npy holds no embeddings"),
    ],
)
def test_settings_are_refused_beforehand(tmp_path, setting, message):
    with pytest.raises(InputError, match=message):
        jaxdistill.train(configs.load(SPEC, SMALL | setting), tmp_path)
    assert not (tmp_path / "artifacts").exists()


def slow_ranks(found, owner):
    """By their definition, one by one."""
    by_text = [
        sum(found[j, t] >= found[owner[t], t] for j in range(len(found)) if j != owner[t])
        for t in range(len(owner))
    ]
    by_image = []
    for i in range(len(found)):
        best = max(found[i, t] for t in range(len(owner)) if owner[t] == i)
        by_image.append(sum(found[i, t] >= best for t in range(len(owner)) if owner[t] != i))
    return by_text, by_image


def test_ranks_are_those_of_the_definition_with_ties_against_the_method():
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(5), [1, 3, 2, 1, 2])
    found = rng.integers(0, 4, (5, 9)).astype(np.float32)  # many are equal
    by_text, by_image = train_pairs.ranks(found, owner)
    assert (by_text.tolist(), by_image.tolist()) == slow_ranks(found, owner)
    constant = train_pairs.ranks(np.zeros((5, 9), np.float32), owner)
    assert constant[0].tolist() == [4] * 9 and constant[1].tolist() == [8, 6, 7, 8, 7]


def test_recalls_of_perfect_and_of_lost_towers():
    owner = np.repeat(np.arange(20), 2)
    perfect = retrieval.recalls(np.eye(20, dtype=np.float32)[:, owner], owner)
    assert set(perfect.values()) == {1.0} and tuple(perfect) == retrieval.METRICS
    assert set(retrieval.recalls(np.zeros((20, 40), np.float32), owner).values()) == {0.0}
    lost = retrieval.recalls(np.full((20, 40), np.nan, np.float32), owner)
    assert all(np.isnan(x) for x in lost.values())
    # The first text is found at the second place.
    found = np.eye(3, dtype=np.float32)
    found[1, 0] = 2
    assert retrieval.recalls(found, np.arange(3))["IR@1"] == pytest.approx(2 / 3)


@pytest.fixture(scope="module")
def toy():
    """Colours with texts that follow from them; towers must learn how."""
    rng = np.random.default_rng(1)
    colours = rng.integers(0, 256, (240, 3))
    images = np.broadcast_to(colours[:, None, None], (240, 4, 4, 3)).astype(np.uint8)
    texts = np.tanh((colours / 128 - 1) @ rng.normal(size=(3, 12)) / 2).astype(np.float32)
    return images, texts[:, None], np.ones(240, np.int32)


def normalize(images):
    return (images / 255 if images.dtype == jnp.uint8 else images) - 0.5


PROTOCOL = train_pairs.Protocol(steps=300, batch=64, rate=3e-3, strategy="none")
TOWERS = train_pairs.fresh((4, 4, 3), 12, 8, "mlp", 1, 1, "none")


def mean_recall(params, images, texts):
    seen = train_pairs.seen(TOWERS, params, images, normalize=normalize)
    read = np.asarray(TOWERS.text(params, jnp.asarray(texts[:, 0])))
    return retrieval.recalls(seen @ read.T, np.arange(len(images)))["mean"]


def test_all_pairs_teach_what_shuffled_ones_do_not(toy):
    whole, shuffled = ([x[:200] for x in toy] for _ in range(2))
    shuffled[1] = shuffled[1][np.random.default_rng(2).permutation(200)]
    found = [
        mean_recall(
            train_pairs.train(
                jax.random.key(0),
                TOWERS,
                train_pairs.Pairs(*own),
                normalize=normalize,
                protocol=PROTOCOL,
            ),
            *(x[200:] for x in toy[:2]),
        )
        for own in (whole, shuffled)
    ]
    chance = (1 + 5 + 10) / 3 / 40
    assert found[0] > 4 * chance and found[1] < 2 * chance


def test_the_identity_as_similarity_changes_nothing_and_another_does(toy):
    own = [x[:32] for x in toy]
    protocol = PROTOCOL._replace(steps=3, batch=16)

    def trained(similarity):
        return train_pairs.train(
            jax.random.key(0),
            TOWERS,
            train_pairs.Pairs(*own, similarity),
            normalize=normalize,
            protocol=protocol,
        )["text"]["kernel"]

    plain = trained(None)
    np.testing.assert_allclose(trained(np.eye(32, dtype=np.float32)), plain, atol=1e-6)
    soft = np.full((32, 32), 0.5, np.float32)
    assert np.abs(trained(soft) - plain).max() > 1e-3


def test_an_artefact_comes_back_and_a_damaged_one_does_not(tmp_path):
    rng = np.random.default_rng(3)
    images, texts, similarity = (
        rng.uniform(size=s).astype(np.float32) for s in ((5, 4, 4, 3), (5, 7), (5, 5))
    )
    made = pairs.DistilledPairs(images, texts, similarity, {"dataset": "toy"})
    pairs.save(tmp_path, made)
    back = jaxdistill.load_pairs(tmp_path)
    for name in ("images", "texts", "similarity"):
        np.testing.assert_array_equal(getattr(back, name), getattr(made, name))
    assert back.card["dataset"] == "toy"
    wrong = {
        "no pairs": made._replace(texts=texts[:4]),
        "outside": made._replace(images=images + 1),
        "not images and texts": made._replace(texts=None),
        r"shapes \[\(5, 4, 4, 3\), \(5, 7\), \(4, 4\)\]": made._replace(
            similarity=similarity[:4, :4]
        ),
    }
    for message, other in wrong.items():
        pairs.save(tmp_path / "other", other)
        with pytest.raises(InputError, match=message):
            pairs.load(tmp_path / "other")
    with pytest.raises(Diverged, match="images of the pairs is not finite"):
        pairs.save(tmp_path, made._replace(images=images * np.nan))
    card = json.loads((tmp_path / "pairs.json").read_text())
    (tmp_path / "pairs.json").write_text(json.dumps(card | {"sha256": "0"}))
    with pytest.raises(InputError, match="is not the card of"):
        pairs.load(tmp_path)
