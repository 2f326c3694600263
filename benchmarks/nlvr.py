r"""Sentences that people wrote about pictures, true or false, read by two real tokenizers.

    python benchmarks/nlvr.py --prepare=runs/nlvr --data=path/to/nlvr \
        --gpt2=path/to/gpt2 --llama2=path/to/tokenizer.model

makes of NLVR (Suhr et al., "A Corpus of Natural Language for Visual Reasoning", 2017; CC BY 4.0;
github.com/lil-lab/nlvr) a folder of questions, and prints the command that trains on it. `--data`
holds `dev/dev.json`, `test/test.json` and their images; `--gpt2` the files `encoder.json` and
`vocab.bpe`; both tokenizers may be left out.

The published dev split is what models are trained on, without the sentences that stand in the test
split too, and one part of its sentences in six is held out for validation: no sentence is in two
splits, written in whatever case and with whatever spaces. The three boxes of a picture come in six
orders, which are six examples. A kind says whether the boxes hold a tower of blocks or scattered
objects.
"""

import argparse
import functools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import recording
from PIL import Image

from jaxdistill.data import text
from jaxdistill.errors import InputError
from jaxdistill.io.files import write_files

_ORDERS = 6  # of a picture's boxes
_VALIDATION = 6  # one sentence of so many


class Item(NamedTuple):
    """A sentence and the pictures that it is said of, or not.

    Attributes:
        sentence: As it was written.
        answer: `true` or `false`.
        kind: `tower` or `scatter`.
        images: The files, one for each order of the boxes.
    """

    sentence: str
    answer: str
    kind: str
    images: tuple[Path, ...]


def read(data: Path, split: str) -> list[Item]:
    """The items of a split as published.

    Args:
        data: What holds the split's folder.
        split: `dev` or `test`.

    Raises:
        InputError: If the file is missing or another.
    """
    path = data / split / f"{split}.json"
    if not path.is_file():
        raise InputError(f"{path} is missing; give --data the folder with dev and test of NLVR")
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        return [_item(row, data / split / "images", split) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not NLVR's: each line is an object with a sentence") from error


def _item(row: dict[str, Any], images: Path, split: str) -> Item:
    stem = images / row["directory"] / f"{split}-{row['identifier']}"
    files = tuple(stem.with_name(f"{stem.name}-{order}.png") for order in range(_ORDERS))
    return Item(row["sentence"], row["label"], structure(row["structured_rep"]), files)


def structure(boxes: list[list[dict[str, Any]]]) -> str:
    """What three boxes hold: a `tower` of equal blocks above each other, or `scatter`ed objects."""
    objects = [item for box in boxes for item in box]
    shapes = {(item["type"], item["size"]) for item in objects}
    straight = all(len({item["x_loc"] for item in box}) <= 1 for box in boxes)
    return "tower" if straight and len(shapes) == 1 and ("square", 20) in shapes else "scatter"


def same(sentence: str) -> str:
    """What is left of a sentence when case, spaces and the full stop are not looked at."""
    return " ".join(sentence.casefold().replace(".", " ").split())


def splits(dev: list[Item], test: list[Item], seed: int = 0) -> dict[str, list[Item]]:
    """Items to train on, to choose settings on, and to measure on, without a common sentence."""
    asked = {same(item.sentence) for item in test}
    pool = [item for item in dev if same(item.sentence) not in asked]
    sentences = sorted({same(item.sentence) for item in pool})
    held = np.random.default_rng(seed).permutation(len(sentences))[: len(sentences) // _VALIDATION]
    late = {sentences[i] for i in held}
    return {
        "train": [item for item in pool if same(item.sentence) not in late],
        "validation": [item for item in pool if same(item.sentence) in late],
        "test": test,
    }


def prepare(folder: Path, data: Path, height: int, seed: int = 0) -> dict[str, Counter]:
    """Writes images and lines as `jaxdistill.data.vqa.folder` reads them.

    Args:
        folder: Where to; a new one.
        data: What holds NLVR's `dev` and `test`.
        height: Of the images in pixels; their width is four times that, as of the original ones.
        seed: Decides which sentences are held out, and the order of the lines, of which a run takes
            the first.

    Returns:
        How many questions of each kind and answer there are in each split.

    Raises:
        InputError: If the folder is there, or the data are not as published.
    """
    if folder.exists():
        raise InputError(f"{folder} is there already; remove it, or give another")
    found = splits(read(data, "dev"), read(data, "test"), seed)
    (folder / "images").mkdir(parents=True)
    counts = {}
    for number, (split, items) in enumerate(found.items()):
        lines = [(item, image) for item in items for image in item.images]
        rng = np.random.default_rng([seed, number])
        lines = [lines[i] for i in rng.permutation(len(lines))]
        for _, image in lines:
            _shrink(image, folder / "images" / image.name, height)
        rows = [
            {
                "image": f"images/{image.name}",
                "question": item.sentence,
                "answer": item.answer,
                "kind": item.kind,
            }
            for item, image in lines
        ]
        lines_of = "".join(json.dumps(row) + "\n" for row in rows)
        write_files({folder / f"{split}.jsonl": functools.partial(_put, lines_of)})
        counts[split] = Counter((row["kind"], row["answer"]) for row in rows)
    return counts


def _put(text: str, file) -> None:
    file.write(text.encode())


def _shrink(source: Path, target: Path, height: int) -> None:
    try:
        with Image.open(source, formats=("PNG",)) as image:
            small = image.convert("RGB").resize((4 * height, height), Image.Resampling.BILINEAR)
    except OSError as error:
        raise InputError(f"{source} is missing or damaged; unpack NLVR again") from error
    small.save(target, "PNG")


def tokenizer_files(folder: Path, gpt2: Path | None, llama2: Path | None) -> None:
    """Puts tokenizers beside the questions: GPT-2's as `gpt2.json`, Llama 2's as `llama2.model`.

    Raises:
        InputError: If a file is missing.
    """
    if gpt2 is not None:
        import tokenizers  # only now that it is needed

        names = [str(gpt2 / name) for name in ("encoder.json", "vocab.bpe")]
        try:
            made = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*names))
        except Exception as error:  # the library's own has no other base
            raise InputError(f"{gpt2} has no encoder.json and vocab.bpe of GPT-2") from error
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.save(str(folder / "gpt2.json"))
    if llama2 is not None:
        if not llama2.is_file():
            raise InputError(f"{llama2} is no file; give --llama2 a tokenizer.model")
        shutil.copyfile(llama2, folder / "llama2.model")


def command(folder: Path, height: int) -> str:
    """What trains a teacher that reads as GPT-2 and students that read as Llama 2."""
    options = {
        "teacher.tokenizer": f"cut:{folder}/gpt2.json",
        "student.tokenizer": f"cut:{folder}/llama2.model",
        "teacher.patch": height // 5,
        "student.patch": height // 2,
    }
    said = " ".join(f"--config.{name}={value}" for name, value in options.items())
    return (
        f"jaxdistill --config=genrecal:dataset={folder},baselines=sft+blind {said} "
        "--workdir=runs/genrecal_nlvr"
    )


def described(folder: Path) -> dict[str, Any]:
    """What is in the folder, and what both tokenizers make of it, whole and cut to the training."""
    rows = {
        split: [json.loads(x) for x in (folder / f"{split}.jsonl").read_text("utf-8").splitlines()]
        for split in ("train", "validation", "test")
    }
    asked = {split: sorted({r["question"] for r in own}) for split, own in rows.items()}
    found: dict[str, Any] = {
        split: {
            "questions": len(own),
            "sentences": len(asked[split]),
            "true": sum(r["answer"] == "true" for r in own) / len(own),
        }
        for split, own in rows.items()
    }
    files = {name: folder / name for name in ("gpt2.json", "llama2.model")}
    if not all(path.is_file() for path in files.values()):
        return found
    corpus = sorted({*asked["train"], *(r["answer"] for r in rows["train"])})
    cut = {}
    for name, path in files.items():
        # SentencePiece's own files are read as a tokenizer.json is.
        whole = text.tokenizer(str(path), ())
        cut[name] = text.tokenizer(f"cut:{path}", corpus)
        split_otherwise = sum(_pieces(whole, x) != _pieces(cut[name], x) for x in asked["test"])
        found[name] = {"ids": cut[name].size, "test sentences split otherwise": split_otherwise}
    one, other = cut.values()
    apart = sum(_pieces(one, x) != _pieces(other, x) for x in asked["train"])
    return found | {"training sentences in other pieces": apart}


def _pieces(by: text.Tokenizer, sentence: str) -> list[bytes]:
    return [by.pieces[i] for i in by.split(sentence)]


def main() -> None:
    """Prepares the folder and says how to go on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prepare", type=Path, required=True, help="the folder that is made")
    parser.add_argument("--data", type=Path, required=True, help="NLVR's dev and test")
    parser.add_argument("--gpt2", type=Path, help="folder with encoder.json and vocab.bpe")
    parser.add_argument("--llama2", type=Path, help="a tokenizer.model")
    parser.add_argument("--height", type=int, default=50, help="of images, a multiple of 10")
    args = parser.parse_args()
    if args.height < 10 or args.height % 10:
        parser.error(f"--height={args.height}: patches need a multiple of 10")
    try:
        counts = prepare(args.prepare, args.data, args.height)
        tokenizer_files(args.prepare, args.gpt2, args.llama2)
    except InputError as error:
        parser.error(str(error))
    for split, own in counts.items():
        said = ", ".join(f"{n} {kind} {answer}" for (kind, answer), n in sorted(own.items()))
        print(f"{split}: {own.total()} questions: {said}")
    record = described(args.prepare)
    recording.write(recording.FOLDER / "nlvr.json", record)
    print(json.dumps(record, indent=1))
    print(command(args.prepare, args.height))


if __name__ == "__main__":
    main()
