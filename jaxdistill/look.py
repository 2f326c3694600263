"""What a run would do, and whether what one has left is what it says; nothing is made by either."""

import os
from pathlib import Path

import jax
from jaxtyping import PyTree

from jaxdistill import experiment, run_folder, settings, stage
from jaxdistill.errors import InputError
from jaxdistill.eval import results
from jaxdistill.interrupt import never
from jaxdistill.io import weights
from jaxdistill.io.files import expanded
from jaxdistill.settings import Config, Row


@jax.enable_x64(False)  # as `train` runs it
def preview(config: Config, workdir: str | os.PathLike[str]) -> str:
    """Checks everything that `train` would, makes nothing, and says what it would do.

    Raises:
        InputError: As `train` does.
    """
    resolved, folder = settings.resolve(config), expanded(workdir)
    if (
        resolved.generator is not None
        and not (experiment.generated(folder) / "generated.npz").is_file()
    ):
        before = preview(resolved.generator.stated(), folder / "generator")
        experiment.check_beforehand(resolved, folder, never)
        rows = ", ".join(resolved.rows)
        return f"{before}\n\nthen, of what that has made: {rows}"
    ready = experiment.set_up(config, folder)
    lines = [["row", "method", "steps", "state", "given", "in the workdir"]]
    for name, row in ready.experiment.rows.items():
        recipe = ready.recipes[name]
        examples = recipe.examples or ready.loaded.task.examples
        state = stage.shapes_of(recipe, examples, lambda state: state)
        place = experiment.row_folder(folder, ready.experiment, name)
        there = (place / "artifacts" / ready.experiment.family.ARTEFACT).is_file()
        sizes = [_megabytes(state), _megabytes(recipe.frozen.shapes)]
        lines.append([name, row.method, str(recipe.steps), *sizes, _stands(place, there)])
    evals = (f"{name} ({e.given})" for name, e in ready.experiment.evals.items())
    return f"{results.markdown(lines)}\n\nthen measured by: {', '.join(evals) or 'nothing'}"


@jax.enable_x64(False)  # as `train` runs it
def verify(workdir: str | os.PathLike[str]) -> str:
    """Checks that what a workdir holds is what it says that it is; nothing is made or changed.

    The data are read again and must be those that the rows were made from. Of each finished row the
    arrays must be those that its card describes, and the card that of the settings in its folder; a
    teacher that lies there must be the one that they name.

    Args:
        workdir: Of a run, finished or not.

    Returns:
        A table of what was found of each row.

    Raises:
        InputError: If anything differs, or is not there to be checked.
    """
    folder = expanded(workdir)
    config = run_folder.config(folder)
    ready = experiment.set_up(config, folder)
    lines, wrong = [["row", "found"]], []
    for row in ready.experiment.rows.values():
        try:
            found = _verified(ready, row, experiment.row_folder(folder, ready.experiment, row.name))
        except InputError as error:
            found = f"wrong: {error}"
            wrong.append(row.name)
        lines.append([row.name, found])
    table = results.markdown(lines)
    if wrong:
        print(table)
        raise InputError(
            f"{', '.join(wrong)} in {folder} {'is' if len(wrong) == 1 else 'are'} not what "
            f"{'it says' if len(wrong) == 1 else 'they say'}; see the table above"
        )
    return table


def _verified(ready: experiment.Ready, row: Row, place: Path) -> str:
    """What is found of a row; its settings and data have been compared with the config's.

    Raises:
        InputError: If something of it is not what it says.
    """
    family, recipe = ready.experiment.family, ready.recipes[row.name]
    if not (place / "artifacts" / family.ARTEFACT).is_file():
        return "not finished"
    shapes = stage.output_shapes(recipe, recipe.examples or ready.loaded.task.examples)
    _, card = family.read(place / "artifacts", shapes)
    # Of a row with a guarantee the card leaves out what identifies the data.
    withheld = tuple(ready.loaded.source) if recipe.withholds else ()
    identity, known = run_folder.identity(place), run_folder.identity(place, withheld)
    if card.get("config_hash") != settings.digest(known) or card.get("settings") != known:
        raise InputError(f"its card is of other settings than those in {place / 'row.json'}")
    for name, value in ready.loaded.source.items():
        named = card.get("provenance", {}).get(name)
        if name not in withheld and named != value:
            raise InputError(f"its card names other data ({name}={named}, now {value})")
    teacher = ready.workdir / "teacher"
    if (teacher / "teacher.safetensors").is_file():
        sha256 = weights.load(teacher, "teacher")[1]["sha256"]
        if identity.get("teacher_sha256", sha256) != sha256:
            raise InputError(f"the teacher in {teacher} is not the one that it names")
    hashes = " ".join(
        f"{n.removesuffix('_sha256')} {v[:12]}" for n, v in identity.items() if n.endswith("sha256")
    )
    return f"whole, of settings {card['config_hash']}, {hashes}"


def _megabytes(shapes: PyTree) -> str:
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)]
    return f"{sum(sizes) / 1e6:.1f} MB"


def _stands(folder: Path, there: bool) -> str:
    """What the folder of a row has of it."""
    checkpoints = folder / "checkpoints"
    begun = checkpoints.is_dir() and any(checkpoints.iterdir())
    return "finished" if there else "begun" if begun else "nothing"
