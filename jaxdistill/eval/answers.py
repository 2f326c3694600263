"""Answers to questions about images, against those that are right to the letter."""

from collections import Counter
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.data import text, vqa
from jaxdistill.errors import InputError, Interrupted
from jaxdistill.eval import results
from jaxdistill.eval.bench import Bench
from jaxdistill.eval.results import Cell
from jaxdistill.io.writers import Progress
from jaxdistill.keywords import Between
from jaxdistill.parallel import processes
from jaxdistill.settings import digest
from jaxdistill.task import VLMTask

FAMILY = "vlm"

_WHOLE = "exact match"


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
    stand the teacher, and the most frequent answer of each kind of question.

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
    rows = ["majority", *(["teacher"] if teacher else []), *bench.rows]
    wanted = [Cell(bench.name, row, metric, 0, protocol) for row in rows for metric in metrics]
    missing = {cell.row for cell in bench.results.missing(wanted)}
    todo = processes.mine([row for row in rows if row in missing])
    bar = Progress(len(todo), 0, "answering") if todo else None
    for done, row in enumerate(todo):
        if bench.should_stop():
            raise Interrupted("stopped while answering; the rows that are done are kept")
        right = _right(bench, row, batch_size)
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
    if processes.is_first():
        print(
            f"{bench.task.name}: {len(asked.questions.answers)} questions, right to the letter, %"
        )
        print(results.table(records, lambda values: f"{100 * values[0]:.1f}"))
    return records


def majority(known: vqa.Questions, asked: vqa.Questions) -> np.ndarray:
    """Which questions the most frequent answer of their kind answers, bool (n,).

    Args:
        known: Where answers are counted.
        asked: What is to be answered.
    """
    counted: dict[int, Counter] = {}
    for kind, answer in zip(known.kinds.tolist(), known.answers, strict=True):
        counted.setdefault(kind, Counter())[answer] += 1
    best = {kind: min(c, key=lambda text, c=c: (-c[text], text)) for kind, c in counted.items()}
    pairs = zip(asked.kinds.tolist(), asked.answers, strict=True)
    return np.array([best.get(kind) == answer for kind, answer in pairs])


def _right(bench: Bench, row: str, batch_size: int) -> np.ndarray:
    """Which questions a row answers, bool (n,)."""
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
    written: list[str] = []
    n = len(asked.questions.answers)
    for first in range(0, n, batch_size):
        # The last batch is filled up, so that one program serves all.
        index = np.minimum(np.arange(first, first + batch_size), n - 1)
        args: Any = (asked.pair.images, own.question, own.question_there)
        made_ids = answer(params, frozen, *(jnp.asarray(x[index]) for x in args)).tokens
        ids = np.asarray(made_ids)[: n - first]
        written += [text.answer_text(by, row) if text.EOS in row else "" for row in ids]
    return np.array([a == b for a, b in zip(written, asked.questions.answers, strict=True)])
