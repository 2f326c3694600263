"""What GenRecal's Recalibrators do: read the student, or copy the teacher."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.data.passes import passes
from jaxdistill.errors import InputError, Interrupted
from jaxdistill.eval import results, sampling
from jaxdistill.eval.bench import Bench
from jaxdistill.eval.results import Cell
from jaxdistill.io import pictures
from jaxdistill.io.writers import Progress
from jaxdistill.keywords import Between
from jaxdistill.parallel import processes
from jaxdistill.settings import digest
from jaxdistill.task import VLMTask

FAMILY = "vlm"

_PREFIXES = ("teacher", "regularized", "recalibrated", "swapped")
_METRICS = (
    *(f"{prefix}, {place}" for place in ("first", "later") for prefix in _PREFIXES),
    "cosine, own",
    "cosine, others",
)


def check(task: VLMTask, data: Any, **others: Any) -> None:
    """Refuses what would leave no other example to take a prefix from.

    Raises:
        InputError: In this case.
    """
    del task, others
    if len(data.questions.answers) < 2:
        raise InputError("recalibration needs two questions at least to swap their prefixes")


def evaluate(
    bench: Bench,
    *,
    batch_size: Annotated[int, Between(2, 10**6)] = 250,
    pairs: Annotated[int, Between(2, 100)] = 10,
) -> list[dict]:
    """Looks into the Recalibrator of every row that has one, and prints the table.

    The cross-entropy of an answer's tokens in the teacher's vocabulary, of the first token and of
    the later ones: by the `teacher` itself, behind its own prefix through the Recalibrator
    (`regularized`), behind the student's (`recalibrated`), and behind the student's of another
    question (`swapped`). Where the last two agree, nothing of the student is read. Beside it, of
    some questions, the cosines between mean recalibrated states behind the student's and behind the
    teacher's prefix: of the same question, and of others; `artifacts/recalibration-ROW.png` shows
    them all. Recalibrators are as the second stage left them, and students as the third.

    Args:
        bench: What is measured.
        batch_size: Questions at a time.
        pairs: Questions whose cosines are taken.

    Returns:
        A record for each row and metric.

    Raises:
        Interrupted: If it is stopped; what is measured by then is kept.
    """
    protocol = digest([bench.identity, batch_size, pairs])
    rows = [name for name, made in bench.rows.items() if made.recipe.aside is not None]
    cells = [Cell(bench.name, row, metric, 0, protocol) for row in rows for metric in _METRICS]
    missing = {cell.row for cell in bench.results.missing(cells)}
    missing |= {row for row in rows if not _picture(bench, row).is_file()}
    todo = processes.mine([row for row in rows if row in missing])
    bar = Progress(len(todo), 0, "looking into Recalibrators") if todo else None
    for done, row in enumerate(todo):
        if bench.should_stop():
            raise Interrupted("stopped between rows; those that are done are kept")
        found, cosines = _looked_into(bench, row, batch_size, pairs)
        picture = pictures.matrix(cosines, "student's prefix", "teacher's")
        sampling.write_picture(_picture(bench, row), picture)
        values = zip(_METRICS, found, strict=True)
        bench.results.keep({Cell(bench.name, row, m, 0, protocol): {"value": v} for m, v in values})
        bar.update(done + 1, {})
    if bar is not None:
        bar.close()
    bench.results.gather()
    records = bench.results.records(cells)
    if rows and processes.is_first():
        print("Recalibrators: cross-entropy of the teacher's tokens by prefix, nats")
        print(results.table(records, lambda values: f"{values[0]:.3f}"))
    return records


def _picture(bench: Bench, row: str) -> Path:
    return bench.workdir / "artifacts" / f"recalibration-{row}.png"


def _looked_into(
    bench: Bench, row: str, batch_size: int, pairs: int
) -> tuple[Sequence[float], np.ndarray]:
    """The values of all metrics, and the cosines (pairs, pairs)."""
    made = bench.rows[row]
    given = jax.device_put((made.output(), made.aside(), made.frozen()))
    look = jax.jit(made.recipe.aside.use)
    parts = []
    for batch, count in passes(bench.data.pair, batch_size):
        found = look(*given, jax.tree.map(jnp.asarray, batch))
        parts.append(jax.tree.map(lambda x, count=count: np.asarray(x)[:count], found))
    said = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
    later = said.there.copy()
    later[:, 0] = False
    by_prefix = [getattr(said, prefix) for prefix in _PREFIXES]
    entropies = [
        values[where].mean() if where.any() else np.nan
        for where in (said.there & ~later, later)
        for values in by_prefix
    ]
    means = [x[:pairs] for x in (said.student_mean, said.teacher_mean)]
    ours, theirs = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in means)
    cosines = ours @ theirs.T
    others = cosines[~np.eye(len(cosines), dtype=bool)]
    found = [*entropies, np.diag(cosines).mean(), others.mean()]
    return [float(x) for x in found], cosines
