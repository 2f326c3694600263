"""Distilled sets in other formats, read back by those who define them and by this library."""

import io
import json
import os
import shutil
import tarfile

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

import jaxdistill
from jaxdistill import main
from jaxdistill.data import sources
from jaxdistill.errors import InputError
from jaxdistill.io import artifact
from jaxdistill.io.exports import FORMS, export, folder_names, quantized
from tests.data.test_packed import write_shards
from tests.data.test_sources import save_npz
from tests.io.test_artifact import _digits

NAMES = ["bag", "boot", "coat", "dress", "hat", "pullover", "sandal", "shirt", "sneaker", "top"]
# Where a training split lies in each form, and where a test split would.
SPLITS = {
    "imagefolder": ("train", "test"),
    "webdataset": ("train-000000.tar", "test-000000.tar"),
    "parquet": ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
}


@pytest.fixture(scope="module")
def distilled():
    """Digits whose values are no multiples of 1/255, with soft and learned labels."""
    made = _digits(3, soft=True, class_names=NAMES)
    noise = np.random.default_rng(0).uniform(-0.01, 0.01, made.images.shape)
    images = np.clip(made.images + noise, 0, 1).astype(np.float32)
    order = np.random.default_rng(1).permutation(len(images))
    arrays = (made.labels, made.soft_labels, made.learned_labels)
    labels, soft, learned = (x[order] for x in arrays)
    return artifact.Distilled(images[order], labels, soft, made.card, learned)


@pytest.fixture(scope="module")
def run(distilled, tmp_path_factory):
    """A workdir, as far as this needs one."""
    folder = tmp_path_factory.mktemp("run")
    artifact.save(folder / "artifacts", distilled)
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The set in every form."""
    root = tmp_path_factory.mktemp("exports")
    for form in FORMS:
        export(run, root / form, form)
    return root


def by_class(distilled):
    """The set as an image folder has it: by classes, and in its own order in each."""
    order = np.argsort(distilled.labels, kind="stable")
    return quantized(distilled.images)[order], distilled.labels[order]


# --- by this library ---


@pytest.mark.parametrize("form", FORMS)
def test_what_leaves_enters_again_as_it_was(form, distilled, exported, tmp_path):
    other = _digits(2, first=10, class_names=NAMES)
    artifact.save(tmp_path / "artifacts", other)
    export(tmp_path, tmp_path / "other", form)
    folder = shutil.copytree(exported / form, tmp_path / "data")
    train, test = SPLITS[form]
    (tmp_path / "other" / train).rename(folder / test)
    data = sources.load(folder)
    assert data.class_names == tuple(NAMES)
    for split, made in ((data.train, distilled), (data.test, other)):
        images, labels = (quantized(made.images), made.labels)
        if form == "imagefolder":
            images, labels = by_class(made)
        np.testing.assert_array_equal(split.images, images)
        np.testing.assert_array_equal(split.labels, labels)


def test_bytes_are_off_by_half_a_step_at_most(distilled):
    values = np.float32([0, 0.2, 0.5, 1, 1 / 255, 1 / 510 - 1e-6, 1 / 510 + 1e-6])
    assert quantized(values).tolist() == [0, 51, 128, 255, 1, 0, 1]
    off = np.abs(quantized(distilled.images) / 255 - distilled.images.astype(np.float64))
    assert 0.9 / 510 < off.max() <= 1 / 510
    steps = (np.arange(256) / 255).astype(np.float32)
    np.testing.assert_array_equal(quantized(steps), np.arange(256))


@pytest.mark.parametrize("form", FORMS)
def test_the_card_goes_with_the_images(form, run, exported):
    card = json.loads((exported / form / "distilled.json").read_text("utf-8"))
    assert card == artifact.load(run).card
    # Readable to whom the run's own files are.
    modes = {path.stat().st_mode & 0o777 for path in (exported / form).rglob("*.*")}
    assert (exported / form / "distilled.json").stat().st_mode & 0o777 in modes
    assert not list((exported).glob(".*"))


@pytest.mark.parametrize("form", FORMS)
def test_the_same_set_gives_the_same_bytes(form, run, exported, tmp_path):
    export(run / "artifacts", tmp_path / "again", form)
    files = [p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*.*")]
    assert len(files) > 1
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (exported / form / file).read_bytes()


def test_grey_and_colour_and_sets_without_a_card(tmp_path):
    made = _digits(1)
    colour = made._replace(
        images=made.images.repeat(3, -1) * np.float32([1, 0.5, 0.25]),
        card=made.card | {"mean": [0.3] * 3, "std": [0.3] * 3},
    )
    for name, one, mode in (("grey", made, "L"), ("colour", colour, "RGB")):
        artifact.save(tmp_path / name, one)
        (tmp_path / name / "distilled.json").unlink()
        export(tmp_path / name, tmp_path / f"{name}-out", "imagefolder")
        path = tmp_path / f"{name}-out" / "train" / "7" / "000007.png"
        with Image.open(path) as image:
            assert image.mode == mode
            pixels = np.asarray(image).reshape(one.images[7].shape)
        np.testing.assert_array_equal(pixels, quantized(one.images[7]))
        assert not (tmp_path / f"{name}-out" / "distilled.json").exists()


def test_shards_have_the_exact_values(distilled, exported):
    with tarfile.open(exported / "webdataset" / "train-000000.tar") as archive:
        for member in archive:
            key, _, kind = member.name.partition(".")
            content, i = archive.extractfile(member).read(), int(key)
            if kind == "cls":
                assert int(content) == distilled.labels[i]
            elif kind != "png":
                name = "images" if kind == "npy" else kind.removesuffix(".npy")
                stored = np.load(io.BytesIO(content), allow_pickle=False)
                assert stored.dtype == np.float32
                np.testing.assert_array_equal(stored, getattr(distilled, name)[i])


def test_large_sets_are_several_shards(distilled, run, tmp_path, monkeypatch):
    from jaxdistill.io import exports

    monkeypatch.setattr(exports, "_SHARD", 13)
    export(run, tmp_path / "out", "webdataset")
    assert len(list((tmp_path / "out").glob("train-*.tar"))) == 3
    shutil.copy(tmp_path / "out" / "train-000000.tar", tmp_path / "out" / "test-0.tar")
    data = sources.load(tmp_path / "out")
    np.testing.assert_array_equal(data.train.labels, distilled.labels)
    np.testing.assert_array_equal(data.train.images, quantized(distilled.images))


def test_tables_have_the_exact_values(distilled, exported):
    table = pyarrow.parquet.read_table(exported / "parquet" / "data")
    said = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert said["label"] == {"names": NAMES, "_type": "ClassLabel"} and table.column_names == [
        *said
    ]
    assert table["label"].to_pylist() == distilled.labels.tolist()
    for column, name in (
        ("pixels", "images"),
        *((n, n) for n in ("soft_labels", "learned_labels")),
    ):
        stored = np.array(table[column].to_pylist(), np.float32)
        np.testing.assert_array_equal(stored, getattr(distilled, name))


# --- names of folders ---


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        (["cat", "dog"], None),
        (["Ärzte-Band", "中文 (a)", "한국"], None),
        (["dog", "cat"], ["0 dog", "1 cat"]),  # sorted they would be other classes
        (["T-shirt/top", "Trouser"], ["0 T-shirt-top", "1 Trouser"]),
        (["Cat", "cat"], ["0 Cat", "1 cat"]),  # one folder on some systems
        (["..", "a"], ["0", "1 a"]),
        ([".a", "b"], ["0 a", "1 b"]),
        (["", "b"], ["0", "1 b"]),
        (["a ", "b"], ["0 a", "1 b"]),
        (["a" * 300, "b"], ["0 " + "a" * 60, "1 b"]),
        ([str(i) for i in range(10)], None),
        ([str(i) for i in range(11)], [f"{i:02d} {i}" for i in range(11)]),
        (["a\0b", "c\nd"], ["0 a-b", "1 c-d"]),
    ],
)
def test_folders_sort_as_the_classes_do(names, folders):
    made = folder_names(names)
    assert made == (names if folders is None else folders)
    assert sorted(made) == made and len({name.casefold() for name in made}) == len(names)


# --- what is refused, and what is left then ---


def test_nothing_is_overwritten(run, tmp_path):
    export(run, tmp_path / "deep" / "out", "parquet")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for name in ("deep/out", "file", "link", "empty"):
        with pytest.raises(InputError, match="is there already, and nothing is overwritten"):
            export(run, tmp_path / name, "imagefolder")
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "mine"


def test_what_cannot_be_written_leaves_nothing(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file: File exists"):
        export(run, tmp_path / "file" / "out", "imagefolder")
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write .*out: No space left on device"):
        export(run, tmp_path / "out", "imagefolder")
    assert len(calls) == 5 and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_form_cannot_hold(run, tmp_path):
    with pytest.raises(InputError, match="no form is called 'jpeg'; choose from imagefolder, "):
        export(run, tmp_path / "out", "jpeg")
    with pytest.raises(InputError, match="not a jaxdistill artefact"):
        export(tmp_path, tmp_path / "out", "parquet")
    made = _digits(1)
    card = made.card | {"mean": [0.3] * 2, "std": [0.3] * 2}
    two = made._replace(images=made.images.repeat(2, -1), card=card)
    artifact.save(tmp_path / "two", two)
    for form in FORMS:
        with pytest.raises(InputError, match="images of 2 channels are no PNG files"):
            export(tmp_path / "two", tmp_path / "out", form)
    some = made._replace(images=made.images[:9], labels=made.labels[:9])
    artifact.save(tmp_path / "some", some)
    with pytest.raises(InputError, match=r"class '9' has no image, .* webdataset or parquet"):
        export(tmp_path / "some", tmp_path / "out", "imagefolder")
    assert not (tmp_path / "out").exists()
    export(tmp_path / "some", tmp_path / "out", "parquet")


def test_the_command_line(run, exported, tmp_path, capsys):
    out = tmp_path / "out"
    main.run(["--mode=convert", f"--workdir={run}", f"--out=webdataset:{out}"])
    assert capsys.readouterr().out == f"webdataset in {out}\n"
    name = "train-000000.tar"
    assert (out / name).read_bytes() == (exported / "webdataset" / name).read_bytes()
    for wrong in (["--out=webdataset"], [], ["--out=webdataset:x", "--config=ncfm"]):
        with pytest.raises(InputError, match="write --mode=convert --workdir=FOLDER --out=FORM:FO"):
            main.run(["--mode=convert", f"--workdir={run}", *wrong])
    with pytest.raises(InputError, match="--out=FORM:FOLDER goes with --mode=convert"):
        main.run(["--config=ncfm", f"--workdir={tmp_path}", "--out=parquet:x"])
    assert jaxdistill.export_distilled is export


# --- by the libraries whose formats these are, of the extra interop-test ---


@pytest.mark.parametrize("names", [NAMES, NAMES[::-1], [f"{i}/{i}" for i in range(10)]])
def test_torchvision_reads_the_folders(names, distilled, tmp_path):
    reason = "torchvision is not installed: pip install jaxdistill[interop-test]"
    torchvision = pytest.importorskip("torchvision", reason=reason)
    grey = torchvision.transforms.Compose(
        [torchvision.transforms.Grayscale(), torchvision.transforms.ToTensor()]
    )
    card = distilled.card | {"class_names": names}
    artifact.save(tmp_path / "run", distilled._replace(card=card))
    export(tmp_path / "run", tmp_path / "out", "imagefolder")
    folder = torchvision.datasets.ImageFolder(str(tmp_path / "out" / "train"), grey)
    assert folder.classes == folder_names(names)
    images, labels = by_class(distilled)
    assert [label for _, label in folder] == labels.tolist()
    read = np.stack([image.numpy()[0] for image, _ in folder])[..., None]
    np.testing.assert_array_equal(read, images.astype(np.float32) / 255)


def test_webdataset_reads_the_shards(distilled, exported):
    reason = "webdataset is not installed: pip install jaxdistill[interop-test]"
    webdataset = pytest.importorskip("webdataset", reason=reason)
    shards = str(exported / "webdataset" / "train-000000.tar")
    read = list(webdataset.WebDataset(shards, shardshuffle=False).decode("l8"))
    keys = ("png", "npy", "cls", "soft_labels.npy", "learned_labels.npy")
    png, npy, cls, soft, learned = (np.stack([row[key] for row in read]) for key in keys)
    np.testing.assert_array_equal(png, quantized(distilled.images)[..., 0])
    np.testing.assert_array_equal(npy, distilled.images)
    np.testing.assert_array_equal(cls, distilled.labels)
    np.testing.assert_array_equal(soft, distilled.soft_labels)
    np.testing.assert_array_equal(learned, distilled.learned_labels)


@pytest.fixture
def datasets():
    reason = "datasets is not installed: pip install jaxdistill[interop-test]"
    return pytest.importorskip("datasets", reason=reason)


@pytest.mark.parametrize("form", ["parquet", "imagefolder"])
def test_datasets_reads_tables_and_folders(form, datasets, distilled, exported, tmp_path):
    data_dir = str(exported / form)
    read = datasets.load_dataset(form, data_dir=data_dir, cache_dir=str(tmp_path))
    assert [*read] == ["train"] and read["train"].features["label"].names == NAMES
    images, labels = by_class(distilled)
    if form == "parquet":
        images, labels = quantized(distilled.images), distilled.labels
    assert read["train"]["label"][:] == labels.tolist()
    pixels = np.stack([np.asarray(image) for image in read["train"]["image"]])[..., None]
    np.testing.assert_array_equal(pixels, images)
    if form == "parquet":
        rows = read["train"].with_format("numpy")
        for column, name in (("pixels", "images"), ("soft_labels", "soft_labels")):
            np.testing.assert_array_equal(np.stack(list(rows[column])), getattr(distilled, name))


def test_datasets_reads_the_shards(datasets, distilled, exported, tmp_path):
    files = str(exported / "webdataset" / "train-*.tar")
    read = datasets.load_dataset("webdataset", data_files=files, cache_dir=str(tmp_path))["train"]
    assert read["cls"][:] == distilled.labels.tolist()


@pytest.mark.parametrize("way", ["save_to_disk", "to_parquet", "texts"])
def test_what_datasets_writes_is_read_here(way, datasets, distilled, tmp_path):
    images, names = quantized(distilled.images), sorted(NAMES, reverse=True)
    columns = {
        "image": [Image.fromarray(x[..., 0]) for x in images],
        "label": [names[i] for i in distilled.labels],
    }
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    if way == "texts":
        kinds["label"] = datasets.Value("string")
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    if way == "save_to_disk":
        datasets.DatasetDict({"train": made, "test": made}).save_to_disk(str(tmp_path / "own"))
    else:
        for split in ("train", "test"):
            made.to_parquet(str(tmp_path / "own" / f"{split}-00000-of-00001.parquet"))
    data = sources.load(tmp_path / "own")
    np.testing.assert_array_equal(data.train.images, images)
    assert data.class_names == tuple(NAMES if way == "texts" else names)
    assert [data.class_names[i] for i in data.train.labels] == columns["label"]


# --- from files to files ---


@pytest.mark.slow
def test_a_run_on_shards_is_the_run_on_the_same_arrays(tmp_path, capsys):
    """Whatever holds the pixels, the set is the same; and it belongs to those pixels."""
    digits = sources.load("digits")
    few = digits.train.images[:40], digits.train.labels[:40], *(x[:20] for x in digits.test)
    save_npz(tmp_path / "own.npz", few)
    write_shards(tmp_path / "own", few)
    made = []
    for data in (tmp_path / "own.npz", tmp_path / "own"):
        workdir = tmp_path / f"run{len(made)}"
        flags = [f"--config=ncfm:dataset={data},method=random,baselines=,smoke"]
        main.run([*flags, "--config.evals.accuracy.epochs=1", f"--workdir={workdir}"])
        made.append(jaxdistill.load_distilled(workdir))
    assert made[0].card["dataset"] == made[1].card["dataset"] == "own"
    assert made[0].card["content_sha256"] == made[1].card["content_sha256"]
    main.run(["--mode=verify", f"--workdir={workdir}"])
    main.run(["--mode=convert", f"--workdir={workdir}", f"--out=parquet:{tmp_path / 'out'}"])
    assert "whole, of settings" in capsys.readouterr().out
    label = pyarrow.parquet.read_table(tmp_path / "out" / "data")["label"]
    assert label.to_pylist() == made[1].labels.tolist()
    write_shards(tmp_path / "own", (few[0] ^ 1, *few[1:]))
    with pytest.raises(InputError, match="source_sha256"):
        main.run(["--mode=verify", f"--workdir={workdir}"])
