"""To a server and back: the library's own client against a small server that speaks its API."""

import base64
import hashlib
import http.server
import json
import shutil
import threading
import urllib.parse

import numpy as np
import pytest

from jaxdistill import hub
from jaxdistill.errors import InputError
from jaxdistill.io import weights

pytest.importorskip("huggingface_hub")


class Server(http.server.BaseHTTPRequestHandler):
    """Repositories in memory: commits by their number, each a dict of files."""

    address: str
    commits: list  # of (sha, files), oldest first
    asked: list

    def log_message(self, *args):
        pass

    def answer(self, content, status=200, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def found(self, revision):
        return next((c for c in self.commits[::-1] if revision in ("main", c[0])), None)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.asked.append(path)
        revision = path.split("/resolve/" if "/resolve/" in path else "/revision/")[-1]
        revision, _, name = revision.partition("/")
        sha, files = self.found(revision) or (None, {})
        if sha is None or ("/resolve/" in path and name not in files):
            self.answer({"error": "not found"}, 404)
        elif "/resolve/" in path:
            etag = hashlib.sha1(files[name]).hexdigest()
            self.answer(files[name], ETag=f'"{etag}"', X_Repo_Commit=sha)
        else:
            siblings = [{"rfilename": name} for name in files]
            self.answer({"id": "me/set", "sha": sha, "siblings": siblings})

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.asked.append(self.path)
        if self.path == "/api/repos/create":
            self.answer({"url": f"http://{self.headers['Host']}/me/set"})
        elif "validate-yaml" in self.path:
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(content)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": path, **modes} for path in paths]})
        else:
            lines = [json.loads(line) for line in content.splitlines()]
            new = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            files = (self.commits[-1][1] if self.commits else {}) | new
            sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
            self.commits.append((sha, files))
            url = f"{self.address}/me/set/commit/{sha}"
            self.answer({"commitUrl": url, "commitOid": sha, "success": True})


@pytest.fixture
def server():
    kind = type("Own", (Server,), {"commits": [], "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        kind.address = f"http://127.0.0.1:{made.server_address[1]}"
        yield kind
        made.shutdown()


@pytest.fixture
def folder(tmp_path):
    """A small student, a card for people, and files that have no business elsewhere."""
    where = tmp_path / "artifacts"
    weights.save(where, "student", {"a": np.arange(5, dtype=np.float32)}, {"family": "flow"})
    (where / "README.md").write_text("---\nlibrary_name: diffusers\n---\n")
    (where / "adapter").mkdir()
    (where / "adapter" / "adapter_config.json").write_text("{}")
    (where / "secret.pkl").write_bytes(b"\x80\x04.")
    (where / "student.safetensors.tmp").write_bytes(b"x")
    return where


KNOWN = {"student.safetensors", "student.json", "README.md", "adapter/adapter_config.json"}


def push(server, folder, **options):
    return hub.push(folder, "me/set", message="m", endpoint=server.address, token="t", **options)


def pull(server, out, **options):
    return hub.pull("me/set", out, endpoint=server.address, token="t", **options)


def test_there_and_back(server, folder, tmp_path):
    sent = push(server, folder)
    assert set(sent.files) == KNOWN and "secret.pkl" in sent.left
    assert set(server.commits[-1][1]) == KNOWN | {hub.MANIFEST}
    out = tmp_path / "new" / "out"
    got = pull(server, out, sha256=sent.sha256)
    assert got == sent._replace(left=())
    assert json.loads((out / hub.RECORD).read_text())["revision"] == server.commits[-1][0]
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert files == KNOWN | {hub.MANIFEST, hub.RECORD}
    for name in KNOWN:
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    params, _ = weights.load(out, "student")
    np.testing.assert_array_equal(params["a"], np.arange(5))
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    # Again: looked at, not fetched.
    server.asked.clear()
    assert pull(server, out) == got
    assert not [path for path in server.asked if "/resolve/" in path]
    (out / "README.md").write_text("other")
    for look in (lambda: pull(server, out), lambda: hub.verify(out)):
        with pytest.raises(InputError, match=r"README\.md is missing or not what its checksum"):
            look()


def test_a_revision_is_a_commit(server, folder, tmp_path):
    first = push(server, folder)
    (folder / "README.md").write_text("second")
    second = push(server, folder)
    assert first.revision != second.revision
    old = pull(server, tmp_path / "old", revision=first.revision)
    assert old.revision == first.revision and old.files == first.files
    with pytest.raises(InputError, match="holds me/set of"):
        pull(server, tmp_path / "old")
    assert pull(server, tmp_path / "new").files == second.files
    with pytest.raises(InputError, match="the server did not do it"):
        pull(server, tmp_path / "none", revision="0" * 40)


def damaged(files):
    return files | {"student.safetensors": files["student.safetensors"] + b"x"}


def listing(files, **more):
    said = json.loads(files[hub.MANIFEST])
    return files | {hub.MANIFEST: json.dumps(said | {"files": said["files"] | more}).encode()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damaged, "student.safetensors is missing or not"),
        (lambda f: listing(f, **{"secret.pkl": "0" * 64}), "no list of checksums"),
        (lambda f: listing(f, **{"../README.md": "0" * 64}), "no list of checksums"),
        (lambda f: listing(f, **{"README.md": 3}), "no list of checksums"),
        (lambda f: listing(f, **{"config.json": "0" * 64}), "lacks config.json"),
        (lambda f: {k: x for k, x in f.items() if k != hub.MANIFEST}, "was not sent by"),
    ],
)
def test_what_is_not_right_leaves_nothing(server, folder, tmp_path, change, message):
    push(server, folder)
    sha, files = server.commits[-1]
    server.commits[-1] = (sha, change(files))
    with pytest.raises(InputError, match=message):
        pull(server, tmp_path / "there" / "out")
    assert not list((tmp_path / "there").glob("*")) if (tmp_path / "there").exists() else True


def test_anothers_files_are_seen_by_the_checksum_one_was_told(server, folder, tmp_path):
    sent = push(server, folder)
    (folder / "student.safetensors").write_bytes(b"whatever")
    push(server, folder)
    with pytest.raises(InputError, match="it is another's"):
        pull(server, tmp_path / "out", sha256=sent.sha256)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="is no SHA-256"):
        pull(server, tmp_path / "out", sha256="abc")


def test_unknown_files_of_a_repository_stay_there(server, folder, tmp_path):
    push(server, folder)
    sha, files = server.commits[-1]
    server.commits[-1] = (sha, files | {"model.pkl": b"\x80", "run.py": b"exit()"})
    assert pull(server, tmp_path / "out").left == ("model.pkl", "run.py")
    assert not (tmp_path / "out" / "run.py").exists()
    assert not [path for path in server.asked if path.endswith(("model.pkl", "run.py"))]


def test_folders_that_are_none(server, folder, tmp_path):
    push(server, folder)
    with pytest.raises(InputError, match="was not pulled"):
        pull(server, folder)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="holds no file that is known"):
        push(server, folder)
    with pytest.raises(InputError, match="the server did not do it"):
        hub.pull("me/set", tmp_path / "out", endpoint="http://127.0.0.1:9", token="t")
