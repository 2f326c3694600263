"""The page that a run leaves: whole, alone, true to the workdir, and renewed with it."""

import base64
import html
import json
import shutil
import subprocess

import numpy as np
import pytest

from jaxdistill import config as configs
from jaxdistill import main, report, settings
from tests.pages import Page

# All that could end an element, begin one or run, in names that come from outside.
EVIL = "<script>alert('x')</script>&amp;\"<b>.npz"
SMALL = ("method.factor=1", "method.batch_real=4", "method.learning_rate=0.7", "seed=5")


def flags(data, workdir):
    spec = f"--config=ncfm:method=dm,dataset={data},smoke,baselines=random"
    return [spec, *(f"--config.{s}" for s in SMALL), f"--workdir={workdir}"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on images in a file of an evil name, with a folder before it that has a slash."""
    data = tmp_path_factory.mktemp("data") / EVIL
    data.parent.mkdir(parents=True)
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(2), 8)
    images = (90 * labels[:, None, None] + rng.integers(0, 80, (16, 8, 8))).astype(np.uint8)
    arrays = {"train_images": images, "train_labels": labels, "test_images": images}
    names = np.array([EVIL, "two"])
    np.savez(data, **arrays, test_labels=labels, class_names=names)
    workdir = tmp_path_factory.mktemp("run")
    main.run(flags(data, workdir))
    return data, workdir


def test_the_page_is_well_formed_and_says_what_the_run_was(run):
    workdir = run[1]
    page = Page(workdir / report.NAME)
    card = json.loads((workdir / "artifacts" / "distilled.json").read_text())
    for text in (EVIL, card["content_sha256"], card["provenance"]["source_sha256"]):
        assert text in page.text
    assert "&amp;amp;" in (workdir / report.NAME).read_text()
    assert f"jax {card['provenance']['versions']['jax']}" in page.text
    assert len(page.pictures) == len(list(workdir.rglob("*.png"))) == 2
    assert "http" not in (workdir / report.NAME).read_text().lower().replace("http-equiv", "")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_a_browser_shows_it_and_runs_nothing_of_it(run, tmp_path):
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--v=0"]
    address = (run[1] / report.NAME).as_uri()
    done = subprocess.run([*command, address], capture_output=True, text=True, timeout=120)
    assert "<script" not in done.stdout and html.escape(EVIL, quote=False) in done.stdout
    assert done.stdout.count("<svg") == 1 and done.stdout.count("<img") == 2
    assert "CONSOLE" not in done.stderr  # where what the policy refuses would be told


def test_its_table_is_that_of_the_records(run):
    records = json.loads((run[1] / "results.json").read_text())
    cells = Page(run[1] / report.NAME).cells
    for row in ("dm", "random"):
        own = [r for r in records if r["row"] == row]
        values = [100 * r["value"] for r in own]
        assert len(values) == 2
        assert [row, f"{np.mean(values):.1f} ± {np.std(values):.1f}"] in cells
        worst = [100 * min(r["classes"]) for r in own]
        (by_class,) = [cell for cell in cells if cell[0] == row and "hard labels" in cell[1]]
        assert by_class[2] == f"{np.mean(worst):.1f} ± {np.std(worst):.1f}"


def test_every_setting_stands_there_and_those_not_by_default_are_marked(run):
    workdir = run[1]
    page = Page(workdir / report.NAME)
    shown = {(row[0], row[1]): row[2] for row in page.cells if len(row) == 3}
    stated = json.loads((workdir / "config.json").read_text())
    rows = [*stated["baselines"].values(), *stated["evals"].values(), stated["method"]]
    for row in rows:
        del row["name"]  # which stands above the table
    groups = [stated[name] for name in ("data", "extractor", "pool", "parallel", "run")]
    for name, value in (item for group in (*groups, *rows) for item in group.items()):
        value = tuple(value) if isinstance(value, list) else value
        assert (name, value if isinstance(value, str) else repr(value)) in shown
    assert "By default" in shown["learning_rate", "0.7"]
    marked = (workdir / report.NAME).read_text().split('class="changed"')[1:]
    found = {text.split("<td>")[1].split("</td>")[0] for text in marked}
    assert "learning_rate" in found and "placement" not in found


def test_its_curves_are_those_of_the_file(run):
    lines = [json.loads(x) for x in (run[1] / "metrics.jsonl").read_text().splitlines()]
    page = Page(run[1] / report.NAME)
    values = np.array([line["match"] for line in lines])
    assert len(values) == 2
    (drawn,) = page.drawings
    assert (drawn[1][1] < drawn[0][1]) == (values[1] > values[0])  # upwards is less
    assert f"dm {values[-1]:.4g}" in page.text


def test_it_holds_the_config_that_makes_the_run_again(run, tmp_path):
    workdir = run[1]
    links = Page(workdir / report.NAME).links
    (link,) = [x for x in links if x.startswith("data:")]
    path = tmp_path / "config.json"
    path.write_bytes(base64.b64decode(link.partition(",")[2]))
    assert path.read_bytes() == (workdir / "config.json").read_bytes()
    again = settings.resolve(configs.load(str(path)))
    assert again.stated() == json.loads((workdir / "config.json").read_text())
    main.run([f"--config={path}", f"--workdir={tmp_path / 'again'}"])
    for name in ("artifacts/distilled.npz", "row.json", "baselines/random/row.json"):
        assert (tmp_path / "again" / name).read_bytes() == (workdir / name).read_bytes()


def test_it_is_left_alone_where_nothing_changed_and_renewed_where_something_did(run, tmp_path):
    data, done = run
    workdir = shutil.copytree(done, tmp_path / "run")
    path = workdir / report.NAME
    before = path.stat()
    main.run(flags(data, workdir))
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    whole = path.read_bytes()
    path.write_text("cut sho")
    main.run(flags(data, workdir))
    assert path.read_bytes() == whole
    main.run([*flags(data, workdir), "--mode=eval", "--config.evals.accuracy.seeds=3"])
    assert "over 3 seeds" in Page(path).text


def test_what_cannot_be_shown_is_passed_over(run, tmp_path, monkeypatch):
    data, done = run
    workdir = shutil.copytree(done, tmp_path / "run")
    (workdir / "artifacts" / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(30))
    (workdir / "artifacts" / "text.png").write_text("<svg onload='alert(1)'>")
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write(f'{{"step": 1{"0" * 400}, "match": 1}}\n{{"step": 8, "match": 1{"0" * 400}}}\n')
        file.write('[1]\n{"step": 9, "match": "nan"}\n{"step": 10, "match": [2]}\n{"st')
    main.run(flags(data, workdir))
    page = Page(workdir / report.NAME)
    assert len(page.pictures) == 2 and len(page.drawings) == 1 and len(page.drawings[0]) == 2
    monkeypatch.setattr(report, "_LARGEST", 100)
    main.run(flags(data, workdir))
    assert Page(path := workdir / report.NAME).pictures == []
    assert "baselines/random/artifacts/distilled.png, " in Page(path).text


def test_a_guarantee_says_that_the_page_has_none(run, tmp_path):
    workdir = shutil.copytree(run[1], tmp_path / "run")
    resolved = settings.resolve(json.loads((workdir / "config.json").read_text()))
    folders = {"dm": workdir, "random": workdir / "baselines" / "random"}
    assert "guarantee" not in report.page(workdir, resolved, folders, [])
    card = workdir / "artifacts" / "distilled.json"
    told = json.loads(card.read_text()) | {"privacy": {"epsilon": 2.0, "delta": 1e-5}}
    card.write_text(json.dumps(told))
    page = report.page(workdir, resolved, folders, [])
    assert "epsilon = 2.0, delta = 1e-05. This page has none" in page
    card.write_text(json.dumps(told | {"privacy": {"epsilon": None}}))
    assert "guarantee" not in report.page(workdir, resolved, folders, [])
