"""UCGM: one network for one call or many, tuned from a teacher or trained from the beginning.

    jaxdistill --config=ucgm:dataset=fashion_mnist --workdir=runs/ucgm

Arguments, joined by commas behind the colon:

    dataset=    soft4 (default) and other points, digits, fashion_mnist, and the rest, as in `flow`
    baselines=  rows beside it, joined by +: half+matching (default), and those of `flow`
    smoke       a run of seconds that only shows that everything works

Rows: `ucgm` has a consistency ratio of 1 and learns where the teacher's paths end, `half` one of a
half, and `matching` one of 0, which is flow matching; each is sampled with several numbers of
calls. Data, teacher, network and budget are those of `flow`. `--config.method.fresh` trains it from
the beginning, and `--config.method.enhancement=0` lets it learn from the data alone; the tables
have a teacher in either case.

    config                              hardware, and the distance of two calls to the data
    ucgm:dataset=soft4                  2 CPU cores, minutes; `half` 0.10 ± 0.02, sliced W2
    ucgm:dataset=checkerboard           2 CPU cores, minutes; `half` 0.09 ± 0.02, sliced W2
    ucgm:dataset=fashion_mnist          2 CPU cores, hours; `half` 9.7 ± 0.1, Fréchet, 100 steps
    ucgm:dataset=latents_imagenet       a TPU slice, compiled for it; not run
"""

from jaxdistill import config as configs

# Of Fashion-MNIST, by row: the best of four on held-out images at 100 steps (docs/ucgm.md), but for
# the ratio of 1, whose best, 0.003, came apart when it was trained longer.
_RATES = {"ucgm": 1e-3, "half": 1e-2, "matching": 1e-3}
_CALLS = (1, 2, 4, 8, 16, 32)


def get_config(argument=None, dataset=None):
    """The recipe of a data set."""
    arg = configs.parse_argument(
        argument, words=("smoke",), dataset="soft4", baselines="half+matching", seed=0
    )
    dataset = arg["dataset"] if dataset is None else dataset
    others = [name for name in arg["baselines"].split("+") if name not in ("", "half", "matching")]
    smoke = ",smoke" if arg["smoke"] else ""
    config = configs.load(
        f"flow:method=ucgm,baselines={'+'.join(others)},seed={arg['seed']}{smoke}",
        {"data.name": dataset},
    ).unlock()
    scale = config.teacher.guidance
    own = {
        "half": {"consistency": 0.5},
        # No noise on the way, and the guidance that the teacher has; without labels it has none.
        "matching": {
            "consistency": 0.0,
            "enhancement": 1 - 1 / scale,
            "kappa": 1 / 3,
            "times": (1.0, 1.0, 1.0),
        },
    }
    for name in arg["baselines"].split("+"):
        if name in own:
            config.baselines[name] = config.method.copy_and_resolve_references()
            config.baselines[name].update(own[name])
    if dataset == "fashion_mnist":
        for name, row in (("ucgm", config.method), *config.baselines.items()):
            row.learning_rate = _RATES.get(name, row.learning_rate)
    config.evals.samples.nfe = _CALLS[:2] if arg["smoke"] else _CALLS
    return config
