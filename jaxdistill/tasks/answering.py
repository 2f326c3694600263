"""Students of vision-language models alone: read, used, and written for other libraries."""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jaxdistill import keywords
from jaxdistill.data import text
from jaxdistill.data.text import ANSWER, Tokenizer
from jaxdistill.errors import InputError
from jaxdistill.io import decoders, shards, weights
from jaxdistill.io.files import dump, expanded, write_files
from jaxdistill.io.reading import one_line, read_json
from jaxdistill.task import Language
from jaxdistill.tasks import languages
from jaxdistill.tasks.languages import Model, Student, normalized

ARTEFACT = "student.safetensors"
TOKENIZER = "tokenizer.json"

_VISION = "vision"
_MULTIPLE = 16  # to which the tokens of questions are padded


class Trained(NamedTuple):
    """A student that is ready for use.

    Attributes:
        answer: `(images, questions) -> answers`: uint8 images (n, h, w, c), or ones in [0, 1], and
            as many texts; the texts of the answers, each the likeliest token by token.
        image_shape: (h, w, c) of an image.
        card: What the student says of itself.
    """

    answer: Callable[[Any, Sequence[str]], list[str]]
    image_shape: tuple[int, int, int]
    card: dict[str, Any]


class _Stored(NamedTuple):
    """A student on disk, checked."""

    params: PyTree
    card: dict[str, Any]
    tokenizer: Tokenizer
    language: Language
    depth: int
    image_shape: tuple[int, int, int]


def _stored(folder: str | os.PathLike[str]) -> _Stored:
    """What a run or `export_student` has left of a student."""
    folder = expanded(folder)
    inner = folder / "artifacts"
    folder = inner if (inner / ARTEFACT).is_file() else folder
    exported = not (folder / ARTEFACT).is_file() and (folder / decoders.WEIGHTS).is_file()
    params, card = _exported(folder) if exported else weights.load(folder, "student")
    try:
        model, sizes = (
            kind(**keywords.resolve(kind, card["config"][name], name))
            for name, kind in (("model", Model), ("student", Student))
        )
        shape, _ = tuple(card["image_shape"]), card["answer_length"]
        by = text.tokenizer(str(folder / TOKENIZER), ())
        if by.fingerprint() != card["tokenizer_sha256"]:
            raise InputError(f"{folder / TOKENIZER} is not the student's tokenizer")
        language = languages.language(model, sizes, by.size, shape)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder / 'student.json'} is not the card of a student of this version "
            f"({one_line(error)}); train it again, or use the version that made it"
        ) from error
    wanted = jax.eval_shape(language.init, jax.random.key(0))
    weights.check_shapes(f"the student in {folder}", params, wanted)
    return _Stored(params, card, by, language, sizes.depth, shape)


def _exported(folder: Path) -> tuple[PyTree, dict]:
    """The parameters of a student in the files of `export_student`, and its card."""
    card = read_json(folder / "student.json")
    vision, own = weights.load(folder, _VISION)
    path = folder / decoders.WEIGHTS
    known = card.get("decoder_sha256") if isinstance(card, dict) else None
    if known is None or own.get("decoder_sha256") != known or shards.sha256(path) != known:
        raise InputError(f"{path}, vision.safetensors and student.json are not of one student")
    shape, depth, _, tied = decoders.decoder_shape(folder)
    params, _ = decoders.load_decoder(path, "qwen2", shape, depth, tied=tied)
    return params | vision, card


def export_student(folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Writes a student in the layout of Hugging Face.

    Its decoder is `model.safetensors` with `config.json`, a Llama's, which other programs read. The
    layers before it, of the image, are `vision.safetensors`. `tokenizer.json`, whose ids follow
    three of ours (padding, end, answer), and the card `student.json` go with them, and
    `load_student` reads all of it.

    Args:
        folder: As of `load_student`.
        out: Made if missing.

    Raises:
        InputError: If there is no student, or `out` cannot be written or holds other weights.
    """
    stored, out = _stored(folder), expanded(out)
    block = stored.language.block
    if (out / ARTEFACT).is_file():
        raise InputError(f"{out} holds a student of a run; give another folder")
    if (out / decoders.WEIGHTS).is_file() and not _is_ours(out):
        raise InputError(f"{out / decoders.WEIGHTS} is another model's; give another folder")
    params = jax.tree.map(np.asarray, stored.params)
    left = decoders.save_decoder(out, params, "qwen2", block)
    known = shards.sha256(out / decoders.WEIGHTS)
    rest = {name: params[name] for name in {path.partition("/")[0] for path in left}}
    weights.save(out, _VISION, rest, {"decoder_sha256": known})
    config = decoders.config_of(block, stored.depth, stored.tokenizer.size)
    config |= {"bos_token_id": None, "eos_token_id": text.EOS, "pad_token_id": text.PAD}
    write_files(
        {
            out / "config.json": functools.partial(dump, config),
            out / TOKENIZER: lambda file: file.write(stored.tokenizer.stored.encode()),
            out / "student.json": functools.partial(dump, stored.card | {"decoder_sha256": known}),
        }
    )


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds what `export_student` wrote."""
    try:
        return "decoder_sha256" in read_json(folder / "student.json")
    except (InputError, OSError, TypeError):
        return False


def load_student(folder: str | os.PathLike[str]) -> Trained:
    """Reads a student that a run has made; it needs neither config, data nor teacher.

    Args:
        folder: A workdir, one of its `baselines/`, the folder `artifacts` in either, or what
            `export_student` wrote.

    Raises:
        InputError: If there is no student, or its tokenizer is missing or another.
    """
    stored = _stored(folder)
    language, by, card, shape = stored.language, stored.tokenizer, stored.card, stored.image_shape
    length = card["answer_length"]
    write = jax.jit(functools.partial(language.generate, length=length))
    params = jax.device_put(stored.params)

    def answer(images, questions):
        images = np.asarray(images)
        if images.shape != (len(questions), *shape):
            raise InputError(
                f"{len(questions)} questions go with images {(len(questions), *shape)}, not "
                f"{images.shape}"
            )
        asked = text.tokens(by, questions, ANSWER)
        # A program serves questions of similar lengths.
        room = -asked.ids.shape[1] % _MULTIPLE
        ids, there = (np.pad(x, ((0, 0), (0, room))) for x in asked)
        if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
            raise InputError(f"images are uint8, or numbers in [0, 1], not {images.dtype}")
        images = normalized(images if images.dtype == np.uint8 else 255.0 * images)
        images = images * np.float32(not card.get("blind"))
        written = write(params, images, ids, there)
        return [text.answer_text(by, row) for row in np.asarray(written.tokens)]

    return Trained(answer, shape, card)
