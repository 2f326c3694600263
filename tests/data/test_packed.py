"""WebDataset shards and Hugging Face tables, written here from digits, whole and hostile."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from jaxdistill.data import sources, splits, tables
from jaxdistill.errors import InputError
from tests.data.test_sources import assert_same, write_image_folder

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def png(image) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image[..., 0]).save(file, "PNG")
    return file.getvalue()


def examples(images, labels):
    """The members of a shard, by name."""
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield f"{i:04d}.png", png(image)
        yield f"{i:04d}.cls", b"%d\n" % label
        yield f"{i:04d}.json", b"{}"


def write_tar(path: Path, members, form=tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, few, form=tarfile.GNU_FORMAT) -> Path:
    for number in range(2):
        part = slice(20 * number, 20 * number + 20)
        members = examples(few[0][part], few[1][part])
        write_tar(folder / f"train-{number:06d}.tar", members, form)
    write_tar(folder / "test-000000.tar", examples(*few[2:]), form)
    return folder


def table(images, labels, /, names=NAMES, **columns):
    """A table as `datasets` writes it."""
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    files = [{"bytes": png(image), "path": None} for image in images]
    columns = {
        "image": pyarrow.array(files, kind),
        "label": pyarrow.array(np.asarray(labels).tolist()),
        **columns,
    }
    features = {"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}
    if names is not None:
        features["label"] = {"names": names, "_type": "ClassLabel"}
    said = {"huggingface": json.dumps({"info": {"features": features}})}
    return pyarrow.table({k: v for k, v in columns.items() if v is not None}, metadata=said)


def write_table(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(content, path, row_group_size=7)
    else:
        with pyarrow.ipc.new_stream(path, content.schema) as writer:
            writer.write_table(content, max_chunksize=7)
    return path


def write_tables(folder: Path, few, names="data/{}-00000-of-00001.parquet") -> Path:
    write_table(folder / names.format("train"), table(*few[:2]))
    write_table(folder / names.format("test"), table(*few[2:]))
    return folder


# --- what is read ---


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_shards(few, tmp_path, form):
    folder = write_shards(tmp_path / "digits_wds", few, form)
    data = sources.load(folder)
    assert data.name == "digits_wds" and data.class_names == tuple("0123456789")
    assert_same(data, few)
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in NAMES))
    assert sources.load(folder).class_names == tuple(NAMES)
    assert sources.load(folder, image_size=4).image_shape == (4, 4, 1)


def test_shards_in_folders_of_the_splits_and_members_in_folders(few, tmp_path):
    # As CLIP's benchmarks have them.
    for split, part in (("train", few[:2]), ("test", few[2:])):
        members = [(f"./a b/{name}", content) for name, content in examples(*part)]
        write_tar(tmp_path / split / "0.tar", members)
        (tmp_path / split / "nshards.txt").write_text("1")
    assert_same(sources.load(tmp_path), few)


@pytest.mark.parametrize(
    "names",
    [
        "data/{}-00000-of-00001.parquet",
        "data/{}-00000-of-00001-a09b74b3ef9c3b56.parquet",
        "{}.parquet",
        "{}/0000.parquet",
        "{}/data-00000-of-00001.arrow",
    ],
)
def test_tables(few, tmp_path, names):
    data = sources.load(write_tables(tmp_path / "own", few, names))
    assert data.name == "own" and data.class_names == tuple(NAMES)
    assert_same(data, few)


def test_identity_is_of_pixels_and_labels_whatever_holds_them(few, tmp_path):
    shards = sources.load(write_shards(tmp_path / "a", few))
    tables = sources.load(write_tables(tmp_path / "b", few))
    assert shards.fingerprint() == tables.fingerprint()
    assert shards.test.fingerprint() == tables.test.fingerprint()
    assert (shards.mean, shards.std) == (tables.mean, tables.std)


def test_a_name_keeps_its_name_where_data_dir_holds_tables(few, tmp_path):
    write_tables(tmp_path, few)
    for name in ("fashion_mnist", "cifar10", "my_own"):
        data = sources.load(name, data_dir=tmp_path)
        assert data.name == name and data.class_names == tuple(NAMES)
        assert_same(data, few)
    assert sources.load("digits", data_dir=tmp_path).train.images.shape[0] == 1437


def test_columns_of_other_names_and_images_as_plain_bytes(few, tmp_path):
    for split, (images, labels) in (("train", few[:2]), ("validation", few[2:])):
        columns = {"img": [png(x) for x in images], "fine_label": labels.tolist()}
        columns |= {"coarse_label": [0] * len(labels)}
        write_table(tmp_path / f"{split}.parquet", pyarrow.table(columns))
    data = sources.load(tmp_path)
    assert data.class_names == tuple("0123456789")
    assert_same(data, few)


def test_labels_that_are_texts_are_sorted(few, tmp_path):
    for split, (images, labels) in (("train", few[:2]), ("test", few[2:])):
        texts = [NAMES[label] for label in labels]
        write_table(tmp_path / f"{split}.parquet", table(images, texts, None))
    data = sources.load(tmp_path)
    assert data.class_names == tuple(sorted(NAMES))
    assert [data.class_names[i] for i in data.train.labels] == [NAMES[i] for i in few[1]]
    stranger = table(few[2], ["zebra"] * len(few[3]), None)
    write_table(tmp_path / "test.parquet", stranger)
    with pytest.raises(InputError, match="row 0 is of class 'zebra', which no training image"):
        sources.load(tmp_path)


def test_an_image_folder_stays_one_whatever_lies_in_it(few, tmp_path):
    folder = write_image_folder(tmp_path, few)
    write_tar(folder / "train" / "all.tar", examples(*few[:2]))
    assert sources.load(folder).class_names[0] == "class0"


# --- which files are of which split ---


def test_splits_by_name(tmp_path):
    for name in ("train-1.tar", "train-0.tar", "valid_0.tar", "training.tar", "x.parquet"):
        (tmp_path / name).touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data").symlink_to(tmp_path / "data")
    with pytest.warns(UserWarning, match=r"1 files of no split .* left out: training\.tar$"):
        found = splits.find(tmp_path, (".tar",))
    assert [path.name for path in found.train] == ["train-0.tar", "train-1.tar"]
    assert [path.name for path in found.test] == ["valid_0.tar"]
    assert splits.find(tmp_path, (".parquet",)) is None
    (tmp_path / "test.tar").touch()
    (tmp_path / "training.tar").unlink()
    with pytest.warns(UserWarning, match=r"left out: valid_0\.tar$"):
        assert [path.name for path in splits.find(tmp_path, (".tar",)).test] == ["test.tar"]
    (tmp_path / "train.parquet").touch()
    with pytest.raises(InputError, match=r"training files in \.tar and in \.parquet"):
        splits.find(tmp_path, (".tar", ".parquet"))


def test_what_is_missing_is_named(few, tmp_path):
    shard = write_tar(tmp_path / "train-0.tar", examples(*few[:2]))
    with pytest.raises(InputError, match=r"no test files; expected test-\*\.tar or validation-"):
        sources.load(tmp_path)
    with pytest.raises(InputError, match=r"is a part of one split; give the folder with it"):
        sources.load(shard)
    shard.rename(tmp_path / "all.tar")
    with pytest.raises(InputError, match=r"is no data set: .* end in \.tar, \.parquet, \.arrow"):
        sources.load(tmp_path)


# --- hostile shards ---


def refused(folder, message):
    with pytest.raises(InputError, match=message) as caught:
        sources.load(folder)
    assert "\n" not in str(caught.value)


def without(kind, at=3):
    return lambda members: [m for m in members if m[0] != f"{at:04d}.{kind}"]


def added(name, content=b"x"):
    return lambda members: [*members, (name, content)]


def replaced(name, content):
    return lambda members: [(n, content if n == name else c) for n, c in members]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("png"),
            r"train-000000\.tar: 0003 has no png, jpg or jpeg; each example needs one",
        ),
        (without("cls"), r"0003 has no cls; each example needs one, with its class id"),
        (added("0003.cls", b"4"), r"0003\.cls is there twice"),
        (added("0003.jpg"), r"0003 has png and jpg; each example needs one image"),
        (added("0003.pyd"), r"0003\.pyd is a pickle, which is never read"),
        (added("0003.meta.PICKLE"), r"0003\.meta\.PICKLE is a pickle, which is never read"),
        (added("../../../etc/x.png"), r"\.\./\.\./\.\./etc/x has no cls"),
        (replaced("0003.png", b"no image"), r"0003\.png is not a readable png or jpeg"),
        (replaced("0003.png", b""), r"0003\.png is not a readable png or jpeg"),
        (replaced("0003.cls", b"-1"), r"0003 has a cls that is no class id"),
        (replaced("0003.cls", b"cat"), r"0003 has a cls that is no class id"),
        (replaced("0003.cls", b"9" * 4000), r"0003 has a cls that is no class id"),
        (replaced("0003.cls", b"4000000000"), r"0003 has a cls that is no class id"),
        (replaced("0003.cls", b"12"), r"0003\.png is of class 12, but .* names only 10 classes"),
        (lambda members: [("readme", b"")], r"readme has no png"),
        (lambda members: [], r"train-000000\.tar holds no example"),
    ],
)
def test_bad_examples_of_shards(few, tmp_path, change, message):
    folder = write_shards(tmp_path, few)
    (folder / "classnames.txt").write_text("\n".join(NAMES))
    members = list(examples(few[0][:20], few[1][:20]))
    write_tar(folder / "train-000000.tar", change(members))
    refused(folder, message)


def test_names_of_members_reach_no_disk(few, tmp_path):
    folder = write_shards(tmp_path / "a" / "b", few)
    for climb in ("../../", "/tmp/../"):
        members = [(f"{climb}{name}", content) for name, content in examples(*few[2:])]
        write_tar(folder / "test-000000.tar", members)
        assert_same(sources.load(folder), few)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [
        "test-000000.tar",
        "train-000000.tar",
        "train-000001.tar",
    ]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_pipes_in_shards_are_refused(few, tmp_path, kind):
    folder = write_shards(tmp_path, few)
    with tarfile.open(folder / "train-000000.tar", "a") as archive:
        member = tarfile.TarInfo("z.png")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    refused(folder, r"z\.png is no plain file; write the shard without links")


def test_sparse_members_are_refused(few, tmp_path):
    folder = write_shards(tmp_path, few)
    with tarfile.open(folder / "train-000000.tar", "a", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("z.png")
        member.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": "99999999999"}
        archive.addfile(member)
    refused(folder, r"z\.png is no plain file")


def test_shards_that_are_cut_off_anywhere(few, tmp_path):
    """Between members too, where a tar only seems to end."""
    folder = write_shards(tmp_path, few)
    path = folder / "train-000001.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        starts = [member.offset for member in archive]
        end = archive.offset
    for cut in (1, 300, starts[1], starts[1] + 100, starts[2] + 512, starts[-1] + 514, end):
        path.write_bytes(whole[:cut])
        refused(folder, r"train-000001\.tar .*(copy it again|remove it or fill it)")
    damaged = bytearray(whole)
    damaged[starts[4] : starts[4] + 512] = b"\xff" * 512
    path.write_bytes(damaged)
    refused(folder, r"train-000001\.tar ends without a mark of its end")
    path.write_bytes(whole[: end + 512])
    assert_same(sources.load(folder), few)


def test_packed_shards_are_not_unfolded(few, tmp_path):
    folder = write_shards(tmp_path, few)
    with tarfile.open(folder / "train-000000.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("0.png"))
    refused(folder, r"cannot read .*train-000000\.tar as a tar file that is not compressed")


def test_lists_of_names_that_are_none(few, tmp_path):
    folder = write_shards(tmp_path, few)
    names = folder / "classnames.txt"
    names.write_bytes(b"\xff\xfe\x00")
    refused(folder, r"classnames\.txt is no UTF-8 text")
    names.write_text("\n".join([*NAMES, "ten"]))
    refused(folder, r"11 class names for 10 classes")
    names.write_bytes(bytes(1 << 25))
    refused(folder, r"classnames\.txt is no list of class names")


def test_small_pictures_in_shards_do_not_fill_the_memory_together(few, tmp_path):
    from tests.data.test_sources import _png_header

    folder = write_shards(tmp_path, few)
    blank = [
        (n, _png_header(8000, 8000) if n.endswith("png") else c) for n, c in examples(*few[:2])
    ]
    for path in folder.iterdir():
        write_tar(path, blank)
    refused(folder, r"are 7680 megapixels in \d+ bytes of files; set data\.image_size")


# --- hostile tables ---


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"label": None},
            r"one column of labels, label or labels or fine_label; it has only image",
        ),
        ({"image": None}, r"one column of images, image or img; it has only label"),
        ({"labels": [0] * 40}, r"one column of labels, .*; it has label and labels"),
        ({"img": [b""] * 40}, r"one column of images, .*; it has image and img"),
        ({"label": [*range(10)] * 3 + [None] * 10}, r"row 30 has no label; leave it out"),
        ({"label": [-1] * 40}, r"row 0 has no label"),
        ({"label": [-2] * 40}, r"row 0 has the label -2, which is no class id"),
        ({"label": [0.5] * 40}, r"row 0 has the label 0\.5, neither a class id nor a text"),
        ({"label": [True] * 40}, r"row 0 has the label True, neither"),
        ({"label": [[0]] * 40}, r"row 0 has the label \[0\], neither"),
        ({"label": ["0"] * 40}, r"labels of .* are numbers here and texts there"),
        ({"label": [*range(11)] * 3 + [0] * 7}, r"row 10 is of class 10, but .* names only 10"),
        ({"image": [None] * 40}, r"row 0 holds no bytes of an image file"),
        ({"image": ["/etc/passwd"] * 40}, r"row 0 holds no bytes of an image file, and files else"),
        ({"image": [{"bytes": None, "path": "/etc/passwd"}] * 40}, r"row 0 holds no bytes"),
        ({"image": [b"no image"] * 40}, r"row 0 is not a readable png or jpeg"),
    ],
)
def test_bad_tables(few, tmp_path, suffix, change, message):
    folder = write_tables(tmp_path, few, f"{{}}-0{suffix}")
    columns = {k: v if v is None else pyarrow.array(v) for k, v in change.items()}
    write_table(folder / f"train-0{suffix}", table(*few[:2], **columns))
    refused(folder, message)


def test_other_orders_of_classes_are_not_mixed(few, tmp_path):
    folder = write_tables(tmp_path, few, "{}.parquet")
    write_table(folder / "test.parquet", table(*few[2:], names=NAMES[::-1]))
    refused(folder, r"test\.parquet has other class names, or another order of them, than")
    write_table(folder / "test.parquet", table(*few[2:], names=None))
    refused(folder, r"test\.parquet has other class names")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"{", "to datasets is damaged"),
        (b"[" * 100_000, "to datasets is damaged"),
        (b'{"info": {"features": {}}}', "to datasets is damaged"),
        (b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": "ab"}}}}', "no texts"),
        (b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": [1]}}}}', "no texts"),
    ],
)
def test_what_is_said_of_columns_may_be_damaged(few, tmp_path, said, message):
    folder = write_tables(tmp_path, few, "{}.parquet")
    content = table(*few[:2]).replace_schema_metadata({b"huggingface": said})
    write_table(folder / "train.parquet", content)
    refused(folder, message)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_tables_that_are_cut_off_or_empty(few, tmp_path, suffix):
    folder = write_tables(tmp_path, few, f"{{}}-0{suffix}")
    path = folder / f"train-0{suffix}"
    whole = path.read_bytes()
    for cut in (0, 3, 100, len(whole) // 2):
        path.write_bytes(whole[:cut])
        refused(folder, rf"cannot read .*train-0\{suffix}: .*; write it again")
    write_table(path, table(few[0][:0], few[1][:0]))
    refused(folder, r"has no rows; remove it or fill it")


def test_tables_that_are_larger_than_their_files(few, tmp_path, monkeypatch):
    """One row of a mebibyte, said many times, is a file of kilobytes."""
    monkeypatch.setattr(tables, "inflation_limit", lambda size: 1 << 22)
    folder = write_tables(tmp_path, few, "{}.parquet")
    path = folder / "train.parquet"
    for value, form in ((bytes(1 << 20), "claims to unfold"), (bytes(1 << 17), "unfolds")):
        many = pyarrow.array([value]).take(pyarrow.array([0] * 50))
        content = pyarrow.table({"image": many, "label": [0] * 50})
        options = {"use_dictionary": form == "unfolds", "compression": "zstd"}
        pyarrow.parquet.write_table(content, path, **options)
        assert path.stat().st_size < 1 << 18
        refused(folder, rf"{form} to more than 4194304 bytes; write it anew")
