"""What the benchmark makes of NLVR, from a small one made here."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxdistill.data import vqa
from jaxdistill.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SENTENCES = [f"there is a tower with {n} blocks" for n in range(12)]


@pytest.fixture(scope="module")
def nlvr():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")  # as Python does for a script
        return runpy.run_path(str(ROOT / "benchmarks" / "nlvr.py"))


def block(x=40, size=20, kind="square"):
    return {"type": kind, "color": "Yellow", "x_loc": x, "y_loc": 80, "size": size}


def published(folder, split, sentences):
    """A split as it is published; each picture's colours say which one it is."""
    rows = []
    for i, sentence in enumerate(sentences):
        images = folder / split / "images" / str(i % 3)
        images.mkdir(parents=True, exist_ok=True)
        for order in range(6):
            colour = (i, order, len(split), 255)
            Image.new("RGBA", (400, 100), colour).save(images / f"{split}-{i}-0-{order}.png")
        boxes = [[block()], [block(), block()], [block(size=10 if i % 2 else 20)]]
        rows.append({
            "sentence": sentence, "label": ("true", "false")[i % 2], "identifier": f"{i}-0",
            "directory": str(i % 3), "structured_rep": boxes,
        })  # fmt: skip
    (folder / split / f"{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def prepared(nlvr, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nlvr")
    tested = ["There  is a tower with 3 blocks.", "another one", "a third"]
    published(folder / "data", "dev", SENTENCES)
    published(folder / "data", "test", tested)
    counts = nlvr["prepare"](folder / "made", folder / "data", 10)
    return folder, counts


def test_no_sentence_is_in_two_splits_and_none_is_lost(nlvr, prepared):
    folder, counts = prepared
    data = vqa.folder(folder / "made", train=999, validation=999, test=999)
    asked = [data.train, data.validation, data.test]
    found = [{nlvr["same"](q) for q in split.questions} for split in asked]
    assert not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])
    assert [len(own) for own in found] == [10, 1, 3]  # one of twelve stands in the test split
    assert found[0] | found[1] == {*SENTENCES} - {SENTENCES[3]}
    assert [len(split.questions) for split in asked] == [60, 6, 18]
    assert [own.total() for own in counts.values()] == [60, 6, 18]
    assert data.kinds == ("scatter", "tower") and {*data.train.answers} == {"true", "false"}


def test_lines_are_about_their_pictures(prepared):
    """Colours say of which sentence and order a picture is."""
    data = vqa.folder(prepared[0] / "made", train=999, validation=999, test=999)
    seen = set()
    for split in (data.train, data.validation):
        assert split.images.shape[1:] == (10, 40, 3)
        for image, question, answer, kind in zip(*split, strict=True):
            number, order = (int(x) for x in image[0, 0, :2])
            assert (image == image[0, 0]).all() and SENTENCES[number] == question
            assert answer == ("true", "false")[number % 2]
            assert data.kinds[kind] == ("tower", "scatter")[number % 2]
            seen.add((number, order))
    assert len(seen) == 11 * 6 and (data.test.images[..., 2] == 4).all()


def test_the_same_data_give_the_same_lines_and_a_few_of_them_are_mixed(nlvr, prepared):
    folder, _ = prepared
    nlvr["prepare"](folder / "again", folder / "data", 10)
    for split in ("train", "validation", "test"):
        one, other = (folder / name / f"{split}.jsonl" for name in ("made", "again"))
        assert one.read_text() == other.read_text()
    few = vqa.folder(folder / "made", train=20, validation=6, test=6)
    assert len({*few.train.questions}) > 5 and np.unique(few.train.kinds).size == 2


def test_what_is_not_there_is_one_line(nlvr, prepared, tmp_path):
    folder, _ = prepared
    with pytest.raises(InputError, match="is there already"):
        nlvr["prepare"](folder / "made", folder / "data", 10)
    with pytest.raises(InputError, match=r"dev\.json is missing; give --data"):
        nlvr["prepare"](tmp_path / "new", tmp_path, 10)
    (tmp_path / "dev").mkdir()
    for said in ('{"sentence": "a"}', "[]", "no"):
        (tmp_path / "dev" / "dev.json").write_text(said)
        with pytest.raises(InputError, match="is not NLVR's"):
            nlvr["prepare"](tmp_path / "new", tmp_path, 10)
    with pytest.raises(InputError, match=r"give --llama2 a tokenizer\.model"):
        nlvr["tokenizer_files"](tmp_path, None, tmp_path / "none.model")
    pytest.importorskip("tokenizers")
    with pytest.raises(InputError, match=r"no encoder\.json and vocab\.bpe"):
        nlvr["tokenizer_files"](tmp_path, tmp_path, None)


def test_structures(nlvr):
    structure = nlvr["structure"]
    assert structure([[block()], [block(), block()], []]) == "tower"
    assert structure([[block(), block(x=60)], [], []]) == "scatter"
    assert structure([[block(size=10)], [], [block()]]) == "scatter"
    assert structure([[block(kind="circle")], [], []]) == "scatter"
