"""UCGM: quality against network calls, for three consistency ratios, beside the teacher's samplers.

    python benchmarks/ucgm.py points --workdir=runs/ucgm           # soft4 and checkerboard
    python benchmarks/ucgm.py images --tune --teacher=runs/flow/fashion_mnist-0
    python benchmarks/ucgm.py images --teacher=runs/flow/fashion_mnist-0
    python benchmarks/ucgm.py images --table                       # the tables, from the records

The workdir of `--teacher` is one of `benchmarks/flow.py`: its teacher is the frozen one of all
tables of flows. Interrupted, the same command goes on. Rates are compared on held-out training
images, over the grid of the other students.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import recording

import jaxdistill
from jaxdistill.eval.results import markdown
from jaxdistill.flow.paths import AUTO, kumaraswamy
from jaxdistill.flow.samplers import SAMPLERS, rk4, ucgm_s
from jaxdistill.flow.targets import TARGETS
from jaxdistill.flow.transports import of_velocity

_ROWS = ("method", "baselines.half", "baselines.matching")
_RATES = ("0.0003", "0.001", "0.003", "0.01")
_POINTS = ("soft4", "checkerboard")
_SHOWN = ("FD to data", "FD to teacher", "recall", "class accuracy", "sliced W2 to data", "CPU s")
# Measured on fewer examples than the other students, for calls are many.
_BUDGET = {
    "steps": "100",
    "batch_size": "32",
    "evals.samples.examples": "1000",
    "evals.samples.paired": "200",
    "evals.samples.reference_steps": "16",
}
# Of the teacher: all samplers at eight calls, UCGM-S at up to forty, the others at eighty.
_TEACHER_ROWS = (
    *(f"{s}:8" for s in ("euler", "midpoint", "dpm_solver_2m", "ucgm_s")),
    *(f"ucgm_s:{n}" for n in (20, 40)),
    *(f"{s}:80" for s in ("midpoint", "dpm_solver_2m")),
)
_LENGTHS = (50, 200, 400)  # of training, for two calls
_POINT_LENGTHS = (30, 100, 300, 1000)
_KAPPAS = (0.0, 0.2, 1 / 3, 0.4, 0.5, 0.75, 0.99)
_STEPS = (4, 8, 16, 32, 64, 128)


def _train(
    name: str,
    slug: str,
    seed: int,
    own: dict[str, str],
    args: argparse.Namespace,
    *,
    alone: bool = False,
) -> dict:
    """The record of a run of the three ratios, or of the first alone."""
    workdir = args.workdir / slug
    overrides = dict(own)
    if name == "fashion_mnist":
        overrides = _BUDGET | overrides
        overrides["teacher.dir"] = str(args.teacher / "teacher")
        overrides.setdefault("evals.samples.judge_dir", str(args.workdir / "judge"))
    rows = ("method",) if alone else _ROWS
    shared = {s: overrides.pop(s) for s in list(overrides) if "." not in s}
    overrides = {f"{row}.{s}": text for row in rows for s, text in shared.items()} | overrides
    beside = [row.removeprefix("baselines.") for row in rows[1:]]
    spec = f"ucgm:dataset={name},seed={seed},baselines={'+'.join(beside)}"
    found = recording.samples(jaxdistill.train(jaxdistill.load_config(spec, overrides), workdir))
    return {
        "run": slug,
        "seed": seed,
        "rows": found,
        **recording.students(workdir, "ucgm", beside),
    }


def _put(path: Path, slug: str, make) -> None:
    if slug not in {r["run"] for r in recording.read(path)}:
        recording.put(path, make(), ("run",))


def images(args: argparse.Namespace) -> None:
    """Fashion-MNIST under the frozen teacher."""
    path = recording.FOLDER / f"ucgm_fashion_mnist{'_tuning' * args.tune}.json"
    if args.tune:
        for rate in _RATES:
            own = {
                "learning_rate": rate,
                "data.holdout_per_class": "250",
                "evals.samples.reference_steps": "8",
                "evals.samples.nfe": "(2, 8)",
                "evals.samples.teacher_rows": "()",
                "evals.samples.judge_dir": str(args.workdir / "judge"),
            }
            _put(path, f"rate {rate}", lambda own=own, r=rate: _train(
                "fashion_mnist", f"rate {r}", 0, own, args
            ))  # fmt: skip
        return
    rates = {f"{row}.learning_rate": rate for row, rate in zip(_ROWS, args.rates, strict=True)}
    for seed in args.seeds:
        first = {"evals.samples.teacher_rows": repr(_TEACHER_ROWS) if not seed else "()"}
        _put(path, f"seed {seed}", lambda own=rates | first, s=seed: _train(
            "fashion_mnist", f"seed {s}", s, own, args
        ))  # fmt: skip
    for ratio, rate in zip((1.0, 0.5), args.rates, strict=False):
        for steps in _LENGTHS:
            own = {
                "learning_rate": rate,
                "steps": str(steps),
                "method.consistency": str(ratio),
                "evals.samples.nfe": "(2,)",
                "evals.samples.teacher_rows": "()",
            }
            slug = f"ratio {ratio}, {steps} steps"
            _put(path, slug, lambda own=own, s=slug: _train(
                "fashion_mnist", s, 0, own, args, alone=True
            ))  # fmt: skip


def points(args: argparse.Namespace) -> None:
    """Points in the plane, and the sampler's error on an exact flow."""
    path = recording.FOLDER / "ucgm_points.json"
    _put(path, "kappa", lambda: {"run": "kappa", "errors": kappa_curve()})
    for name in _POINTS:
        for seed in args.seeds:
            slug = f"{name} {seed}"
            _put(path, slug, lambda n=name, s=slug, k=seed: _train(n, s, k, {}, args))
        # One teacher for all lengths, trained by the first of them where it is not exact.
        first = args.workdir / f"{name}, {_POINT_LENGTHS[0]} steps, {args.seeds[0]}"
        for steps in _POINT_LENGTHS:
            for seed in args.seeds:
                slug = f"{name}, {steps} steps, {seed}"
                own = {
                    "steps": str(steps),
                    "method.consistency": "0.5",
                    "evals.samples.nfe": "(2,)",
                }
                if args.workdir / slug != first and (first / "teacher").is_dir():
                    own["teacher.dir"] = str(first / "teacher")
                _put(path, slug, lambda n=name, s=slug, k=seed, own=own: _train(
                    n, s, k, own, args, alone=True
                ))  # fmt: skip


def kappa_curve() -> list[dict]:
    """Median distance to the ends of exact paths of `ring8`, in float64."""
    found = []
    with jax.enable_x64(True):
        velocity = TARGETS["ring8"]().velocity
        x = jnp.asarray(np.random.default_rng(0).normal(size=(4000, 1, 1, 2)))
        # From the noise level at which all of them start.
        fine = jnp.linspace(0.999, 0.0, 2001)
        ends = rk4(velocity, x, fine)

        def error(end):
            return float(jnp.median(jnp.linalg.norm((end - ends).reshape(-1, 2), axis=1)))

        for grid, shape in (("even", (1.0, 1.0, 1.0)), ("warped", AUTO)):
            run = jax.jit(
                lambda x, times, kappa: ucgm_s(of_velocity(velocity), x, times, kappa=kappa)
            )
            for steps in _STEPS:
                times = kumaraswamy(steps, shape)
                for kappa in _KAPPAS:
                    end = run(x, times, kappa)
                    found.append(
                        {"grid": grid, "calls": steps, "kappa": kappa, "error": error(end)}
                    )
            for name in ("euler", "heun", "midpoint", "dpm_solver_2m"):
                sampler, calls = SAMPLERS[name]
                for steps in _STEPS:
                    end = sampler(velocity, x, kumaraswamy(steps // calls, shape))
                    found.append(
                        {"grid": grid, "calls": steps, "sampler": name, "error": error(end)}
                    )
    return found


def kappa_table(errors: list[dict], grid: str) -> str:
    """Markdown: a row for each kappa and sampler, a column for each number of calls."""
    lines = [["", *(f"{n} calls" for n in _STEPS)]]
    names = dict.fromkeys(
        f"kappa {e['kappa']:.2g}" if "kappa" in e else e["sampler"] for e in errors
    )
    for name in names:
        own = [
            e["error"]
            for e in errors
            if e["grid"] == grid and name in (e.get("sampler"), f"kappa {e.get('kappa', -1):.2g}")
        ]
        lines.append([name, *(f"{e:.2g}" for e in own)])
    return f"median distance to the exact ends, {grid} times\n\n{markdown(lines)}\n"


def lengths_table(records: list[dict], name: str) -> str:
    """Markdown: two calls of ratio 1/2 by length of training, beside eight of the teacher."""
    found, w2 = {}, "sliced W2 to data"
    for record in records:
        law, length, *_ = [*record["run"].split(", "), ""]
        if law == name and length:
            found.setdefault(length, []).append(record)
    lines = [["", "seeds", w2, "CPU s, the quickest"]]
    if found:
        teacher = next(iter(found.values()))[0]["rows"]
        lines += [
            [r["row"], "1", f"{r[w2]:.3f}", ""]
            for r in teacher
            if r["row"].startswith("teacher") and r["calls"] == 8
        ]
    for length, own in found.items():
        values = [r[w2] for record in own for r in record["rows"] if r["row"].startswith("ucgm,")]
        # The first seed's seconds have compilation in them.
        spent = min(record["costs"]["ucgm"]["cpu_seconds"] for record in own)
        measured = f"{np.mean(values):.3f} ± {np.std(values):.3f}"
        lines.append([length, str(len(values)), measured, f"{spent:.1f}"])
    return markdown(lines) + "\n"


def table(records: list[dict], columns: tuple[str, ...] = _SHOWN) -> str:
    """Markdown: mean ± population standard deviation over the seeds of training."""
    cells: dict[str, list[dict]] = {}
    for record in sorted(records, key=lambda r: r["seed"]):
        for row in record["rows"]:
            known = cells.setdefault(row["row"], [])
            if not known or row["row"].split(",")[0] not in ("teacher", "real"):
                known.append(row)
    columns = [c for c in columns if any(c in row for rows in cells.values() for row in rows)]
    lines = [["row", "calls", "seeds", *columns]]
    for name, rows in cells.items():
        shown = []
        for column in columns:
            values = [row[column] for row in rows if row.get(column) is not None]
            spread = f" ± {np.std(values):.2g}" if len(values) > 1 else ""
            shown.append(f"{np.mean(values):.4g}{spread}" if values else "–")
        lines.append([name, str(rows[0]["calls"]), str(len(rows)), *shown])
    return markdown(lines) + "\n"


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("points", "images"))
    parser.add_argument("--workdir", type=Path, default=Path("runs/ucgm"))
    parser.add_argument("--teacher", type=Path, help="a workdir with the frozen teacher")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--rates", nargs=3, default=["0.003"] * 3, help="of ratios 1, 1/2 and 0")
    parser.add_argument("--tune", action="store_true", help="compare rates on held-out images")
    parser.add_argument("--table", action="store_true", help="only print what is recorded")
    args = parser.parse_args()
    if not args.table:
        {"points": points, "images": images}[args.what](args)
    if args.what == "points":
        records = recording.read(recording.FOLDER / "ucgm_points.json")
        for name in _POINTS:
            print(f"{name}\n\n{table([r for r in records if r['run'].startswith(f'{name} ')])}")
            print(f"{name}, ratio 1/2 by length\n\n{lengths_table(records, name)}")
        for record in records:
            if record["run"] == "kappa":
                for grid in ("even", "warped"):
                    print(kappa_table(record["errors"], grid))
        return
    for tuning in (True, False):
        path = recording.FOLDER / f"ucgm_fashion_mnist{'_tuning' * tuning}.json"
        records = recording.read(path)
        seeds = [r for r in records if r["run"].startswith("seed")]
        if seeds:
            print(f"seeds\n\n{table(seeds)}")
        for record in records:
            if record not in seeds:
                print(f"{record['run']}\n\n{table([record])}")


if __name__ == "__main__":
    main()
