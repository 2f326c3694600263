"""What an evaluation is given: the rows that a run has made, and what they were made from.

An evaluation is a module with `evaluate(bench, *, keywords...)`, which measures what is missing in
`bench.results`, prints its table and returns its records. Where it has
`check(task, data, **keywords)`, that is called before anything is run, to refuse settings that
would fail in the end; where it has `FAMILY`, runs of other families are refused, and where it has
`ROWS`, rows of a config that are called as one of these, which its table has beside them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import PyTree

from jaxdistill.eval.results import Results
from jaxdistill.interrupt import ShouldStop, never
from jaxdistill.task import Recipe


class Made(NamedTuple):
    """A row that is finished.

    Attributes:
        name: The name of the row.
        folder: Where its artefact is.
        recipe: What it was made by.
        output: Reads its artefact: a `Distilled` set, or the parameters of a student.
        frozen: Reads what its method was given.
        aside: Reads what its method keeps beside the output, where it keeps something.
    """

    name: str
    folder: Path
    recipe: Recipe
    output: Callable[[], Any]
    frozen: Callable[[], PyTree]
    aside: Callable[[], PyTree]


class Bench(NamedTuple):
    """What an evaluation is given.

    Attributes:
        name: What the config calls the evaluation; its records carry it.
        task: What the rows were made for.
        data: The `Dataset`, with its test split, or the `Target` of points.
        rows: The finished rows, by name, the method's own first.
        workdir: For what should be kept from one start to the next.
        results: What is measured.
        identity: Identifies data and what was trained before any method, such as the teacher.
        should_stop: To be asked between the pieces of what takes long.
    """

    name: str
    task: Any
    data: Any
    rows: dict[str, Made]
    workdir: Path
    results: Results
    identity: dict[str, Any]
    should_stop: ShouldStop = never
