"""What a run made, to the Hugging Face Hub and back, by one function each way; extra `hub`.

Nothing here is called by a run: what is not asked for is neither sent nor fetched. Only files that
this library knows by name travel, none of which can hold code, and `sha256.json` with them, which
has the checksum of each. `pull` holds all files against it before the folder is there at all.
"""

import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxdistill.errors import InputError
from jaxdistill.io.files import dump, expanded, write_files
from jaxdistill.io.reading import one_line, read_json
from jaxdistill.io.shards import sha256, some

FORMAT = "jaxdistill.hub/1"
MANIFEST = "sha256.json"
RECORD = "pulled.json"

_SHARDED = r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
# Artefacts, students, their teachers, and what `export_student` writes.
_KNOWN = re.compile(
    r"README\.md|config\.json|tokenizer\.json"
    r"|distilled\.(npz|json|png)"
    r"|(pairs|student|teacher|head|vision)\.(safetensors|json)"
    rf"|(transformer/)?diffusion_pytorch_model{_SHARDED}|model{_SHARDED}"
    r"|transformer/config\.json|(scheduler/)?scheduler_config\.json"
    rf"|adapter/(adapter_config\.json|adapter_model{_SHARDED})"
)
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Moved(NamedTuple):
    """What was sent or fetched.

    Attributes:
        repository: Where to or from: `owner/name`.
        revision: The commit.
        sha256: The checksum of `sha256.json`, and by it of everything; keep it where the repository
            is named, and give it to `pull`.
        files: name -> checksum.
        left: Other files, which stayed where they were.
    """

    repository: str
    revision: str
    sha256: str
    files: dict[str, str]
    left: tuple[str, ...]


def push(
    folder: str | os.PathLike[str],
    repository: str,
    *,
    message: str,
    public: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
) -> Moved:
    """Sends the known files of a folder, as one commit.

    Cards of students name the folder of their teacher as it was on this machine;
    `jaxdistill.export_student` leaves it out.

    Args:
        folder: Such as `artifacts` of a run, or what `export_student` wrote.
        repository: `owner/name`; it is made if it is not there.
        message: Of the commit.
        public: Whether a repository that is made may be seen by all.
        endpoint: Another server than the Hub's.
        token: Of an account; by default the one that `hf auth login` has stored.

    Raises:
        InputError: If there is no known file, or the server refuses or is not there.
    """
    folder = expanded(folder)
    known, left = _known_files(folder)
    if not known:
        raise InputError(f"{folder} holds no file that is known here; give the folder of artefacts")
    files = {name: sha256(folder / name) for name in known}
    manifest = json.dumps({"format": FORMAT, "files": files}, indent=2).encode() + b"\n"
    hub = _library()
    api = hub.HfApi(endpoint=endpoint, token=token)
    added = {MANIFEST: manifest, **{name: str(folder / name) for name in known}}
    commit = _asked(
        repository,
        lambda: (
            api.create_repo(repository, private=not public, exist_ok=True),
            api.create_commit(
                repository,
                [hub.CommitOperationAdd(name, what) for name, what in added.items()],
                commit_message=message,
            ),
        )[1],
    )
    return Moved(repository, commit.oid, _digest(manifest), files, left)


def pull(
    repository: str,
    out: str | os.PathLike[str],
    *,
    revision: str = "main",
    sha256: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
) -> Moved:
    """Fetches what `push` sent; the folder is there once every checksum is right, or not at all.

    Args:
        repository: `owner/name`.
        out: A folder that is not there yet; or one that this function made, which is then held
            against the same checksums, and nothing is fetched.
        revision: A branch, a tag or a commit; the commit that it stands for is written down in
            `pulled.json`.
        sha256: What `push` returned. Without it the files are only known to be those that the
            repository says it has.
        endpoint: Another server than the Hub's.
        token: As of `push`.

    Raises:
        InputError: If it was not sent from here, a checksum is wrong, a file is missing, `out` is
            taken, or the server refuses or is not there.
    """
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise InputError(f"sha256={sha256!r:.80} is no SHA-256: 64 digits from 0 to f")
    out, hub = expanded(out), _library()
    api = hub.HfApi(endpoint=endpoint, token=token)
    info = _asked(repository, lambda: api.model_info(repository, revision=revision))
    there = [sibling.rfilename for sibling in info.siblings or ()]
    if MANIFEST not in there:
        raise InputError(f"{repository} holds no {MANIFEST}: it was not sent by jaxdistill.hub")
    if out.exists():
        return _again(out, repository, info.sha, sha256)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.") as scratch:
        fetch = functools.partial(
            hub.hf_hub_download,
            repository,
            revision=info.sha,
            local_dir=Path(scratch) / "files",
            endpoint=endpoint,
            token=token,
        )
        _asked(repository, lambda: fetch(MANIFEST))
        files, digest = _manifest(Path(scratch) / "files", sha256)
        lost = sorted(set(files) - set(there))
        if lost:
            raise InputError(f"{repository} lacks {some(lost)}, which its {MANIFEST} names")
        for name in files:
            _asked(repository, lambda name=name: fetch(name))
        _check(Path(scratch) / "files", files)
        left = tuple(sorted(set(there) - {*files, MANIFEST}))
        moved = Moved(repository, info.sha, digest, files, left)
        whole = Path(scratch) / "whole"
        for name in (MANIFEST, *files):
            (whole / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(Path(scratch) / "files" / name, whole / name)
        write_files({whole / RECORD: functools.partial(dump, moved._asdict())})
        whole.rename(out)
    return moved


def verify(folder: str | os.PathLike[str], sha256: str | None = None) -> dict[str, str]:
    """Holds a pulled folder against its checksums.

    Args:
        folder: What `pull` made.
        sha256: As of `pull`.

    Returns:
        name -> checksum.

    Raises:
        InputError: If a file is missing or another than it was.
    """
    folder = expanded(folder)
    files, _ = _manifest(folder, sha256)
    _check(folder, files)
    return files


# -------------------------------------------------------------------------------- folders and files


def _known_files(folder: Path) -> tuple[list[str], tuple[str, ...]]:
    """The names of files that travel, and of those that do not."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    known = [n for n in names if _KNOWN.fullmatch(n) and not (folder / n).is_symlink()]
    return known, tuple(n for n in names if n not in known and n not in (MANIFEST, RECORD))


def _manifest(folder: Path, wanted: str | None) -> tuple[dict[str, str], str]:
    """The checksums of a folder's files, and that of the list itself."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} holds no {MANIFEST}; give a folder that pull has made")
    digest = sha256(path)
    if wanted not in (None, digest):
        raise InputError(f"{MANIFEST} has the SHA-256 {digest}, not {wanted}: it is another's")
    said = read_json(path)
    files = said.get("files") if isinstance(said, dict) and said.get("format") == FORMAT else None
    # A name is no way to other folders, and no name of a file that could hold code.
    good = isinstance(files, dict) and all(
        _KNOWN.fullmatch(name) and isinstance(x, str) and _SHA256.fullmatch(x)
        for name, x in files.items()
    )
    if not good:
        raise InputError(f"{MANIFEST} is no list of checksums of files that are known here")
    return files, digest


def _check(folder: Path, files: Mapping[str, str]) -> None:
    for name, wanted in files.items():
        path = folder / name
        if not path.is_file() or sha256(path) != wanted:
            raise InputError(f"{name} is missing or not what its checksum says; fetch all again")


def _again(out: Path, repository: str, revision: str, wanted: str | None) -> Moved:
    """What is there already, if it is that."""
    if not (out / RECORD).is_file():
        raise InputError(f"{out} is there and was not pulled; give another folder")
    record = read_json(out / RECORD)
    if not isinstance(record, dict) or set(record) != set(Moved._fields):
        raise InputError(f"{out / RECORD} is no record of pull; give another folder")
    moved = Moved(**record)._replace(left=tuple(record["left"]))
    if (moved.repository, moved.revision) != (repository, revision):
        raise InputError(
            f"{out} holds {moved.repository} of {moved.revision}, not {repository} of {revision}; "
            "give another folder"
        )
    if verify(out, wanted or moved.sha256) != moved.files:
        raise InputError(f"{out / RECORD} is of other files; give another folder")
    return moved


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError("this takes huggingface_hub: pip install 'jaxdistill[hub]'") from error
    return huggingface_hub


def _asked(repository: str, ask: Any) -> Any:
    """The answer of a server, whose refusals are one line."""
    try:
        return ask()
    except InputError:
        raise
    # The client raises what its HTTP library does, and errors of its own.
    except Exception as error:
        raise InputError(f"{repository}: the server did not do it ({one_line(error)})") from error
