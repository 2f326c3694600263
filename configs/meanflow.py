"""MeanFlow: a network of mean velocities, whose one call goes any part of the way.

    jaxdistill --config=meanflow:dataset=fashion_mnist --workdir=runs/meanflow

Arguments, joined by commas behind the colon:

    dataset=    soft4 (default) and other points, digits, fashion_mnist, and the rest, as in `flow`
    baselines=  rows beside it, joined by +: fresh (default), and those of `flow`; empty for none
    nfe=        network calls of the students (2)
    smoke       a run of seconds that only shows that everything works

The method is tuned from the teacher and follows it, guidance included; the row `fresh` starts from
nothing and learns from the data alone, with the same budget. Data, teacher, network and budget are
those of `flow`.

    config                                   hardware
    meanflow:dataset=soft4 and other points  2 CPU cores, minutes
    meanflow:dataset=fashion_mnist           2 CPU cores, hours; not run here to its end
"""

from jaxdistill import config as configs


def get_config(argument=None, dataset=None):
    """The recipe of a data set."""
    arg = configs.parse_argument(
        argument, words=("smoke",), dataset="soft4", baselines="fresh", nfe=2, seed=0
    )
    dataset = arg["dataset"] if dataset is None else dataset
    names = [name for name in arg["baselines"].split("+") if name]
    others = "+".join(name for name in names if name != "fresh")
    smoke = ",smoke" if arg["smoke"] else ""
    config = configs.load(
        f"flow:method=meanflow,baselines={others},nfe={arg['nfe']},seed={arg['seed']}{smoke}",
        {"data.name": dataset},
    ).unlock()
    if "fresh" in names:
        config.baselines.fresh = config.method.copy_and_resolve_references()
        guidance = config.teacher.get("guidance", 1.0)
        config.baselines.fresh.update(
            {"fresh": True, "velocity": "data", "rank": 0, "guidance": guidance}
        )
    if arg["smoke"]:
        config.evals.samples.nfe = (1, arg["nfe"])
    return config
