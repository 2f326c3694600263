"""Images with sentences: folders, the hashed encoder, embeddings of one's own."""

import itertools
import json
import runpy
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from jaxdistill.data import captions, dataset
from jaxdistill.data.hashed import hashed
from jaxdistill.errors import InputError

MANY = {"train": 99, "validation": 99, "test": 99}
LINES = [
    {"image": "a.png", "captions": ["a red dog", "an animal", "it runs"]},
    {"image": "sub/b.jpg", "captions": "a blue cat", "split": "train"},
    {"image": "c.png", "captions": ["a green bird"]},
    {"image": "d.png", "captions": ["a car", "a vehicle"], "split": "test"},
]


def written(folder, lines=LINES, unnamed=()):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate([*(x["image"] for x in LINES), *unnamed]):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (6, 4 + i), (40 * i, 0, 0)).save(folder / name)
    text = "".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines)
    (folder / "captions.jsonl").write_text(text)
    return folder


def read(folder, **numbers):
    return captions.folder(folder, **(MANY | numbers), image_size=8)


def test_a_folder_has_images_with_one_or_several_sentences(tmp_path):
    data = read(written(tmp_path / "shelf"))
    assert data.name == "shelf" and data.sentences == 7
    # The last training image is held out where no line says what is.
    assert data.train.sentences == (("a red dog", "an animal", "it runs"), ("a blue cat",))
    assert data.validation.sentences == (("a green bird",),)
    assert data.test.sentences == (("a car", "a vehicle"),)
    assert [x.first.tolist() for x in (data.train, data.validation, data.test)] == [
        [0, 3],
        [4],
        [5],
    ]
    assert data.train.images.shape == (2, 8, 8, 3) and data.train.images.dtype == np.uint8
    assert data.test.images[0, 0, 0].tolist() == [120, 0, 0]
    assert read(tmp_path / "shelf", train=1).train.sentences == data.train.sentences[:1]


def test_a_split_that_is_said_is_kept(tmp_path):
    lines = [*LINES[:2], LINES[2] | {"split": "validation"}, LINES[3]]
    assert len(read(written(tmp_path, lines)).train.images) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"captions": ["a dog"]}, "line 5 has captions without an image; say which file"),
        ({"image": "e.png", "captions": ["a dog"]}, "line 5: 'e.png' is no file in"),
        ({"image": "../a.png", "captions": ["a dog"]}, "'../a.png' is no file in"),
        ({"image": "a.png", "captions": []}, "line 5 has no captions; each line needs"),
        ({"image": "a.png", "captions": [" "]}, "line 5 has no captions"),
        ({"image": "a.png"}, "line 5 has no captions"),
        ({"image": "a.png", "captions": ["x"]}, "'a.png' stands in line 1 too; put its captions"),
        ({"image": "d.png", "captions": "x", "split": "dev"}, "split is 'dev'; choose from train"),
        ({"image": "d.png", "captions": ["\ud800"]}, "a caption has half a character"),
        ("{", "line 5 is no JSON"),
        ("[1]", "line 5 is no object with image and captions"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    with pytest.raises(InputError) as error:
        read(written(tmp_path, [*LINES, line]))
    assert message in str(error.value) and str(error.value).isprintable()


def test_images_that_no_line_names_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"2 of the images in .* have no captions, such as e\.png"):
        read(written(tmp_path, unnamed=("e.png", "sub/f.jpeg", ".hidden.png")))


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(InputError, match=r"captions\.jsonl is missing: a line for each image"):
        read(tmp_path)
    with pytest.raises(InputError, match='no images of the split test; give some lines "split"'):
        read(written(tmp_path, [*LINES[:3], LINES[3] | {"split": "train"}]))


def test_a_sentence_has_one_vector_everywhere():
    sentences = ["A red dog, a RED cat!", "größe", "!!!", "row a b", "row b a"]
    found = hashed(sentences, 64)
    words = ["a", "red", "dog", "a", "red", "cat"]
    grams = [f"{x} {y}" for x, y in itertools.pairwise(words)]
    for word in words:
        marked = f"<{word}>"
        pieces = {marked[i : i + n] for n in (3, 4) for i in range(len(marked) - n + 1)}
        grams += [marked, *(pieces - {marked})]
    want = np.zeros(64)
    for gram in grams:
        code = zlib.crc32(gram.encode())
        want[(code >> 1) % 64] += -1 if code % 2 else 1
    np.testing.assert_allclose(found[0], want / np.linalg.norm(want), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    assert np.abs(found[3] - found[4]).max() > 0.1
    np.testing.assert_array_equal(hashed([sentences[0].casefold()], 64)[0], found[0])
    # Alike sentences are near, others are not.
    near, far = (hashed(["two dogs run on a beach", x], 1024) for x in ("dogs on the beach", "sky"))
    assert near[0] @ near[1] > 0.4 > 0.2 > abs(far[0] @ far[1])


def test_sentences_of_an_image_start_over(tmp_path):
    data = read(written(tmp_path))
    texts = captions.encoded(data.train, "hashed", 32, data.sentences)
    assert texts.vectors.shape == (2, 3, 32) and texts.counts.tolist() == [3, 1]
    np.testing.assert_array_equal(texts.vectors[0], hashed(data.train.sentences[0], 32))
    np.testing.assert_array_equal(texts.vectors[1], hashed(["a blue cat"] * 3, 32))


def test_embeddings_of_ones_own_stand_in_the_order_of_the_file(tmp_path):
    data = read(written(tmp_path / "shelf"))
    rows = np.arange(14, dtype=np.float64).reshape(7, 2)
    np.save(tmp_path / "own.npy", rows)
    splits = data.train, data.validation, data.test
    train, held, test = (captions.encoded(x, str(tmp_path / "own.npy"), 9, 7) for x in splits)
    assert train.vectors.dtype == np.float32
    np.testing.assert_array_equal(train.vectors, rows[[[0, 1, 2], [3, 3, 3]]])
    np.testing.assert_array_equal(held.vectors, rows[[[4]]])
    np.testing.assert_array_equal(test.vectors, rows[[[5, 6]]])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((6, 2)), r"holds float64 of shape \(6, 2\), and there are 7 sentences; give \(7"),
        (np.zeros(7), r"of shape \(7,\), and there are 7 sentences"),
        (np.zeros((7, 2), int), "holds int64 of shape"),
        (np.full((7, 2), np.nan), "holds values that are not finite"),
        (np.array([[object()]] * 7), "Python objects, which are never unpickled"),
        (None, r"holds no embeddings \(No such file or directory\); give hashed, or a \.npy"),
        (b"\x93NUMPY\x01\x00", "holds no embeddings"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(tmp_path, array, message):
    data = read(written(tmp_path / "shelf"))
    path = tmp_path / "own.npy"
    if isinstance(array, bytes):
        path.write_bytes(array)
    elif array is not None:
        np.save(path, array, allow_pickle=True)
    with pytest.raises(InputError, match=message) as error:
        captions.encoded(data.train, str(path), 9, 7)
    assert str(error.value).isprintable()


def test_a_cut_file_takes_no_memory(tmp_path):
    np.save(tmp_path / "own.npy", np.zeros((7, 2)))
    whole = (tmp_path / "own.npy").read_bytes()
    (tmp_path / "own.npy").write_bytes(whole.replace(b"(7, 2)", b"(7, 9)"))
    data = read(written(tmp_path / "shelf"))
    with pytest.raises(InputError, match="do not fill their 112 bytes"):
        captions.encoded(data.train, str(tmp_path / "own.npy"), 9, 7)


def test_grids_describe_themselves():
    images, labels = load_digits(return_X_y=True)
    images = np.rint(images.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    labels = labels.astype(np.int32)
    names = [str(i) for i in range(10)]
    data = dataset.from_arrays(
        images[:900], labels[:900], images[900:], labels[900:], name="d", class_names=names
    )
    made = captions.grid(data, train=20, validation=5, test=5)
    assert made.train.images.shape == (20, 16, 16, 1) and made.sentences == 30
    assert all(len(own) == 1 for own in made.train.sentences)
    assert made.test.first.tolist() == list(range(25, 30))
    assert captions.grid(data, train=20, validation=5, test=5).train.fingerprint() == (
        made.train.fingerprint()
    )


def test_the_benchmark_prepares_what_is_published(tmp_path, monkeypatch):
    root = Path(__file__).resolve().parents[2]
    monkeypatch.syspath_prepend(root / "benchmarks")
    names = runpy.run_path(str(root / "benchmarks" / "pairs.py"))
    raw = tmp_path / "raw"
    (raw / "images").mkdir(parents=True)
    splits = {"train": ["1.jpg", "2.jpg"], "dev": ["3.jpg"], "test": ["4.jpg"]}
    for split, files in splits.items():
        (raw / f"split_{split}.txt").write_text("\n".join(files) + "\n")
        for file in files:
            Image.new("RGB", (8, 8)).save(raw / "images" / file)
    said = {f"{i}.jpg": [f"photo {i}", "a photo"] for i in range(1, 5)}
    (raw / "captions.json").write_text(json.dumps(said))
    counts = names["prepare"](raw, tmp_path / "made")
    assert counts == {"train": 2, "validation": 1, "test": 1}
    data = captions.folder(tmp_path / "made", **MANY)
    assert data.validation.sentences == (("photo 3", "a photo"),) and len(data.train.images) == 2
