"""From a config to a result: distil, write the artefact, train on it, print the table.

`train` and `evaluate` are what the command line calls; a notebook calls them with the same
config. Every stage finds what an earlier start left in the workdir and goes on from there.
"""

import functools
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxdistill import build, run_folder, runner, settings, stage
from jaxdistill.condense import coreset
from jaxdistill.condense.labels import soft_labels
from jaxdistill.data.augment import normalizer
from jaxdistill.errors import InputError, Interrupted
from jaxdistill.eval import results, train_on
from jaxdistill.interrupt import ShouldStop, never
from jaxdistill.io import artifact
from jaxdistill.io.writers import Progress
from jaxdistill.parallel import processes

# What a restart lowers.
_RATES = ("method.rate", "method.sampler_rate", "method.finetune_rate")


def train(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    should_stop: ShouldStop = never,
) -> list[dict]:
    """Distils, then evaluates. An interrupted call with the same arguments goes on.

    Args:
        config: See `configs/`.
        workdir: Gets `config.json`, `versions.json`, `metrics.jsonl`, `checkpoints/`, `pool/`,
            `artifacts/`, `baselines/` and `results.json`.
        should_stop: Asked many times; when it says yes, what was done is kept.

    Returns:
        The records of `results.json`.

    Raises:
        InputError: if the config, the data or the workdir do not fit.
        Interrupted: if `should_stop` said yes.
        OSError: if a file cannot be written.
    """
    setup = set_up(config, workdir)._replace(should_stop=should_stop)
    for name in settings.rows(config):
        _distil(setup, name)
    return _evaluate(setup)


def evaluate(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    should_stop: ShouldStop = never,
) -> list[dict]:
    """Evaluates what `train` left in the workdir; only what is not measured yet is run.

    The settings under `config.eval` may differ from those of the training run.

    Raises:
        InputError: if the workdir holds no artefact, or other settings than `eval` differ.
        Interrupted: if `should_stop` said yes; what is measured by then is kept.
        OSError: if a file cannot be written.
    """
    folder = Path(workdir) / "artifacts"
    if not (folder / "distilled.npz").is_file():
        raise InputError(f"{folder} holds no distilled.npz; run --mode=train in this workdir first")
    setup = set_up(config, workdir)._replace(should_stop=should_stop)
    for name in settings.rows(config):
        _distil(setup, name)
    return _evaluate(setup)


# ---------------------------------------------------------------------------- set-up


def set_up(config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]) -> build.Setup:
    """Checks everything that can be wrong, then makes the workdir.

    Raises:
        InputError: as `train` does.
    """
    build.check(config)
    workdir, stated = Path(workdir), settings.plain(config)
    run_folder.check(workdir, stated, build.identity)
    dataset = settings.load_dataset(config)
    build.check_data(config, dataset)
    run_folder.make(workdir, stated)
    prepare = normalizer(dataset.mean, dataset.std)
    return build.Setup(config, build.config_hash(config), workdir, dataset, prepare)


# ---------------------------------------------------------------------------- distillation


def _distil(setup: build.Setup, name: str) -> None:
    """Runs one method to its artefact; nothing is done when the artefact is there."""
    folder = run_folder.of(setup, name)
    done = (folder / "artifacts" / "distilled.npz").is_file()
    processes.wait(f"{name} is looked for")
    if done:
        return
    config, data = setup.config, setup.dataset
    placement = settings.PLACEMENTS[config.data.placement]
    place = functools.partial(placement, data.train, data.num_classes)

    def method_of(config):
        return build.build_method(config, name, data, setup.prepare)

    frozen = build.build_frozen(setup, name)
    if name == "start":
        # The undistilled start of the same seed: what a run of NCFM has before its first step.
        method, key = method_of(config), jax.random.key(config.seed)
        state = runner.initial_state(method, data=place(), frozen=frozen, key=key)
        ended = stage.Outcome(method, state, 1.0, {"steps": 0})
    else:
        ended = stage.run(
            name,
            method_of,
            config,
            rates=_RATES,
            folder=folder,
            identity=setup.hash,
            place=place,
            frozen=frozen,
            # A coreset takes one image of each class a step.
            steps=config.method.ipc if name in coreset.CORESETS else config.run.steps,
            mesh=build.build_mesh(config, data),
            should_stop=setup.should_stop,
        )
    images = processes.whole(ended.method.output(ended.state)["images"])
    per_class = images.shape[1]
    images = images.reshape(-1, *data.image_shape)
    soft = None
    if config.eval.soft_labels:
        soft = _soft_labels(setup, build.extractors(setup), images)
    factor = config.method.factor if name in ("ncfm", "dm", "start") else 1
    card = card_of(setup, name, factor, ended.cost) | {"rate_factor": ended.rate_factor}
    labels = np.repeat(np.arange(data.num_classes, dtype=np.int32), per_class)
    if processes.is_first():
        artifact.save(folder / "artifacts", artifact.Distilled(images, labels, soft, card))
    processes.wait(f"{name} is distilled")


def card_of(setup: build.Setup, method: str, factor: int, cost: dict) -> dict:
    """What the artefact of a run says of itself, before it is measured."""
    config, data = setup.config, setup.dataset
    return {
        "dataset": data.name,
        "class_names": list(data.class_names),
        "mean": list(data.mean),
        "std": list(data.std),
        "method": method,
        "ipc": config.method.ipc,
        "factor": factor,
        "config_hash": setup.hash,
        "seeds": {"condense": config.seed},
        "accuracies": [],
        "cost": cost,
        "provenance": {"source_sha256": data.fingerprint(), "versions": run_folder.versions()},
    }


def _soft_labels(setup: build.Setup, teachers: dict, images: np.ndarray) -> np.ndarray:
    net = build.convnet(setup.config, setup.dataset, setup.config.pool.width)
    label = jax.jit(
        functools.partial(
            soft_labels,
            net.logits,
            prepare=setup.prepare,
            temperature=setup.config.eval.temperature,
            chunk=setup.config.run.pass_size,
        )
    )
    return np.asarray(label(teachers["trained"], jnp.asarray(images)))


# ---------------------------------------------------------------------------- evaluation


def _evaluate(setup: build.Setup) -> list[dict]:
    """Trains fresh networks on every artefact, keeps the records, prints the table."""
    config, data = setup.config.eval, setup.dataset
    protocol = train_on.Protocol(config.epochs, config.batch, config.rate, strategy=config.strategy)
    protocol_hash = settings.digest([*protocol, setup.config.model.to_dict(), config.temperature])
    methods = settings.rows(setup.config)
    wanted = [
        results.Cell(network, method, labels, seed, protocol_hash)
        for network in config.architectures
        for method in methods
        for labels in (("hard", "soft") if config.soft_labels else ("hard",))
        for seed in range(config.seeds)
    ]
    # Once, for programs are compiled anew for other functions.
    networks = {name: build.judge(build.architecture(setup, name)) for name in config.architectures}
    measured = _gather(setup)
    missing = [cell for cell in wanted if cell not in measured]
    # All processes wait in here, so it is not for one that happens to need it.
    unlabelled = any(_lacks_labels(setup, cell) for cell in missing)
    teachers = build.extractors(setup) if unlabelled else None
    # Networks that differ in their seed alone train together, and each process takes a part.
    same = [list(g) for _, g in itertools.groupby(missing, lambda c: c._replace(seed=0))]
    size = train_on.together()
    groups = processes.mine([g[i : i + size] for g in same for i in range(0, len(g), size)])
    bar = Progress(sum(map(len, groups)), 0, "evaluating") if groups else None
    for group in groups:
        try:
            network = networks[group[0].network]
            _measure(setup, network, teachers, protocol, group, measured, bar)
        except Interrupted as stop:
            kept = sum(cell in measured for cell in wanted)
            raise Interrupted(
                f"stopped while evaluating; {kept} of {len(wanted)} networks are measured"
            ) from stop
    if bar is not None:
        bar.close()
    measured = _gather(setup)
    records = [cell._asdict() | measured[cell] for cell in wanted]
    if not processes.is_first():
        return records
    for method in methods:
        _record_in_card(setup, method, [r for r in records if r["method"] == method])
    where = f"{data.name}, {config.epochs} epochs, {len(data.test.labels)} test images"
    print(f"{where}: accuracy in %, mean ± std over {config.seeds} seeds, last epoch")
    print(results.table(records))
    return records


def _results(setup: build.Setup) -> Path:
    """Where this process writes what it measures."""
    part = "" if processes.is_first() else f"-{jax.process_index()}"
    return setup.workdir / f"results{part}.json"


def _gather(setup: build.Setup) -> dict[results.Cell, dict]:
    """All that is measured, by every process of this start and of earlier ones."""
    processes.wait("results are written")
    parts = sorted(setup.workdir.glob("results-*.json"))
    measured = results.read(setup.workdir / "results.json")
    for part in parts:
        measured |= results.read(part)
    processes.wait("results are read")
    if parts and processes.is_first():
        results.write(setup.workdir / "results.json", measured)
        for part in parts:
            part.unlink()
    processes.wait("results are gathered")
    return measured


def _lacks_labels(setup: build.Setup, cell: results.Cell) -> bool:
    """Whether a measurement needs soft labels that the artefact does not have."""
    if cell.labels != "soft":
        return False
    return artifact.load(run_folder.of(setup, cell.method) / "artifacts").soft_labels is None


def _measure(
    setup: build.Setup,
    network: train_on.Network,
    teachers: dict | None,
    protocol: train_on.Protocol,
    group: Sequence[results.Cell],
    measured: dict[results.Cell, dict],
    bar: Progress,
) -> None:
    """Trains the networks of some cells, which differ in the seed alone, and measures them."""
    data, (cell, *_) = setup.dataset, group
    distilled = artifact.load(run_folder.of(setup, cell.method) / "artifacts")
    targets = train_on.one_hot(distilled.labels, data.num_classes)
    if cell.labels == "soft":
        soft = distilled.soft_labels
        if soft is None:
            soft = _soft_labels(setup, teachers, distilled.images)
        targets = jnp.asarray(soft)
    passes = {"prepare": setup.prepare, "chunk": setup.config.run.pass_size}
    before = bar.done
    start = time.perf_counter(), time.process_time()
    params = train_on.train_many(
        jnp.stack([jax.random.key(cell.seed) for cell in group]),
        network,
        jnp.asarray(distilled.images),
        targets,
        protocol=protocol,
        on_block=lambda part: bar.update(before + part * len(group), {}),
        should_stop=setup.should_stop,
        **passes,
    )
    test_images, test_labels = (jnp.asarray(x) for x in data.test)
    for row, cell in enumerate(group):
        one = jax.tree.map(lambda x, row=row: x[row], params)
        accuracy = train_on.accuracy(network, one, test_images, test_labels, **passes)
        measured[cell] = {
            "accuracy": accuracy,
            "images": len(distilled.labels),
            "epochs": protocol.epochs,
            # Of the networks trained together.
            "wall_seconds": round(time.perf_counter() - start[0], 2),
            "cpu_seconds": round(time.process_time() - start[1], 2),
        }
        bar.update(bar.done, {"accuracy": accuracy})
    results.write(_results(setup), measured)


def _record_in_card(setup: build.Setup, method: str, records: list[dict]) -> None:
    folder = run_folder.of(setup, method) / "artifacts"
    distilled = artifact.load(folder)
    if distilled.card["accuracies"] != records:
        distilled.card["accuracies"] = records
        artifact.save(folder, distilled)
