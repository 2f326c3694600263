"""Answers to questions about images, against those that are right to the letter."""

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.data import text, vqa
from jaxdistill.data.passes import passes
from jaxdistill.errors import InputError, Interrupted
from jaxdistill.eval import results, sampling
from jaxdistill.eval.bench import Bench
from jaxdistill.eval.results import Cell
from jaxdistill.io import pictures
from jaxdistill.io.files import dump, write_files
from jaxdistill.io.reading import read_json
from jaxdistill.io.writers import Progress
from jaxdistill.keywords import Between
from jaxdistill.parallel import processes
from jaxdistill.settings import digest
from jaxdistill.task import VLMTask

FAMILY = "vlm"
ROWS = ("majority", "teacher")

_WHOLE = "exact match"
# Of the picture: questions of a kind, kinds, and lines beside an image.
_SHOWN, _MOST_KINDS, _LINES = 2, 8, 8
_NO_END = "(no end)"


def check(task: VLMTask, data: Any, **others: Any) -> None:
    """Refuses a kind of question that is called as the column of all kinds.

    Raises:
        InputError: In this case.
    """
    del task, others
    if _WHOLE in data.kinds:
        raise InputError(f"a kind of question is called {_WHOLE!r}, as all are together; rename it")


def evaluate(
    bench: Bench, *, batch_size: Annotated[int, Between(1, 10**6)] = 250, teacher: bool = True
) -> list[dict]:
    """Lets every student answer greedily, and prints the table.

    An answer is right if its text is that of the one wanted, its end included. Beside the students
    stand the teacher, and the most frequent answer of each kind of question. What each row said is
    in `answers/ROW.json` of the workdir, a list of texts, null for answers without an end;
    `artifacts/answers.png` shows the first questions of every kind.

    Args:
        bench: What is measured.
        batch_size: Questions answered at a time.
        teacher: Whether the teacher answers too.

    Returns:
        A record for each row and kind of question, and for all kinds together; values are
        fractions.

    Raises:
        Interrupted: If it is stopped; what is measured by then is kept.
    """
    asked, protocol = bench.data, digest([bench.identity])
    metrics = [
        _WHOLE,
        *(k for i, k in enumerate(asked.kinds) if (asked.questions.kinds == i).any()),
    ]
    rows = [*(ROWS if teacher else ROWS[:1]), *bench.rows]
    wanted = [Cell(bench.name, row, metric, 0, protocol) for row in rows for metric in metrics]
    missing = {cell.row for cell in bench.results.missing(wanted)}
    missing |= {row for row in rows if _kept(bench, row) is None}
    todo = processes.mine([row for row in rows if row in missing])
    bar = Progress(len(todo), 0, "answering") if todo else None
    for done, row in enumerate(todo):
        if bench.should_stop():
            raise Interrupted("stopped while answering; the rows that are done are kept")
        said = _said(bench, row, batch_size)
        _file(bench, row).parent.mkdir(exist_ok=True)
        write_files({_file(bench, row): functools.partial(dump, said)})
        right = np.array([a == b for a, b in zip(said, asked.questions.answers, strict=True)])
        kinds = asked.questions.kinds
        measured = {}
        for metric in metrics:
            own = right if metric == _WHOLE else right[kinds == asked.kinds.index(metric)]
            cell = Cell(bench.name, row, metric, 0, protocol)
            measured[cell] = {"value": float(own.mean()), "questions": len(own)}
        bench.results.keep(measured)
        bar.update(done + 1, {_WHOLE: float(right.mean())})
    if bar is not None:
        bar.close()
    bench.results.gather()
    records = bench.results.records(wanted)
    picture = bench.workdir / "artifacts" / "answers.png"
    if processes.is_first():
        if missing or not picture.is_file():
            _draw(bench, rows, picture)
        print(
            f"{bench.task.name}: {len(asked.questions.answers)} questions, right to the letter, %"
        )
        print(results.table(records, lambda values: f"{100 * values[0]:.1f}"))
    return records


def _file(bench: Bench, row: str) -> Path:
    return bench.workdir / "answers" / f"{row}.json"


def _kept(bench: Bench, row: str) -> list[str | None] | None:
    """What a row said, by its file; None where that is missing or another's."""
    if not _file(bench, row).is_file():
        return None
    try:
        said = read_json(_file(bench, row))
    except InputError:
        return None
    good = isinstance(said, list) and len(said) == len(bench.data.questions.answers)
    return said if good and all(isinstance(x, str | None) for x in said) else None


def _draw(bench: Bench, rows: Sequence[str], path: Path) -> None:
    """The first questions of every kind, and what each row said."""
    asked = bench.data.questions
    found = [np.flatnonzero(asked.kinds == i)[:_SHOWN] for i in range(len(bench.data.kinds))]
    index = np.concatenate(found)[: _SHOWN * _MOST_KINDS]
    known = {row: said for row in rows if (said := _kept(bench, row)) is not None}
    captions = [
        [
            asked.questions[i],
            f"wanted: {asked.answers[i]}",
            *(f"{row}: {said[i] or _NO_END}" for row, said in known.items() if row != "majority"),
        ][:_LINES]
        for i in index
    ]
    picture = pictures.captioned(asked.images[index], captions)
    sampling.write_picture(path, picture)


def majority(known: vqa.Questions, asked: vqa.Questions) -> list[str | None]:
    """The most frequent answer of each question's kind; None where the kind is not known.

    Args:
        known: Where answers are counted.
        asked: What is to be answered.
    """
    counted: dict[int, Counter] = {}
    for kind, answer in zip(known.kinds.tolist(), known.answers, strict=True):
        counted.setdefault(kind, Counter())[answer] += 1
    best = {kind: min(c, key=lambda text, c=c: (-c[text], text)) for kind, c in counted.items()}
    return [best.get(kind) for kind in asked.kinds.tolist()]


def _said(bench: Bench, row: str, batch_size: int) -> list[str | None]:
    """What a row answers; None for an answer without an end."""
    asked, task = bench.data, bench.task
    if row == "majority":
        return majority(asked.train, asked.questions)
    side = "teacher" if row == "teacher" else "student"
    length = task.answer_length[side == "student"]
    if row == "teacher":
        params, frozen = jax.device_put(task.teacher.load()["teacher"]), ()

        def sample(params, frozen, *args):
            return task.teacher_model.generate(params, *args, length=length)
    else:
        made = bench.rows[row]
        params, frozen = jax.device_put((made.output(), made.frozen()))

        def sample(params, frozen, *args):
            return made.recipe.sample(params, frozen, *args, length=length)

    answer = jax.jit(sample)
    own, by = getattr(asked.pair, side), asked.tokenizers[side]
    written: list[str | None] = []
    given = asked.pair.images, own.question, own.question_there
    for batch, count in passes(given, batch_size):
        ids = np.asarray(answer(params, frozen, *map(jnp.asarray, batch)).tokens)[:count]
        written += [text.answer_text(by, row) if text.EOS in row else None for row in ids]
    return written
