"""DMD2: students whose examples become as likely as the teacher's, from a warm start.

    jaxdistill --config=pcm:dataset=fashion_mnist --workdir=runs/pcm
    jaxdistill --config=dmd2:dataset=fashion_mnist,start=runs/pcm --workdir=runs/dmd2

Arguments, joined by commas behind the colon:

    dataset=    soft4 (default) and other points, digits, fashion_mnist, and the rest, as in `flow`
    baselines=  rows beside it, joined by +: linear (default), adversarial, gan, and those of
                `flow`; empty for none
    start=      the workdir of another student of the same teacher, which is then that run's too
    nfe=        network calls of the student (2)
    smoke       a run of seconds that only shows that everything works

The row `adversarial` is DMD2 with a discriminator, `gan` the discriminator alone; both start where
the method does, which is the teacher unless there is a `start`. Data, teacher and network
are those of `flow`. A step is five of the critic and one of the student and takes as long as ten to
twenty of other students, so there are fewer.

    config                              hardware
    dmd2:dataset=soft4 and other points 2 CPU cores, minutes
    dmd2:dataset=fashion_mnist          2 CPU cores, hours; not run here to its end
"""

from pathlib import Path

from jaxdistill import config as configs

_FEWER = 10  # steps of other students for one
_OWN = {
    "adversarial": {"adversarial": 0.1},
    "gan": {"adversarial": 1.0, "match": 0.0, "augment": 0.0, "match_norms": False},
}


def get_config(argument=None, dataset=None):
    """The recipe of a data set."""
    arg = configs.parse_argument(
        argument, words=("smoke",), dataset="soft4", baselines="linear", start="", nfe=2, seed=0
    )
    dataset = arg["dataset"] if dataset is None else dataset
    names = [name for name in arg["baselines"].split("+") if name]
    others = "+".join(name for name in names if name not in _OWN)
    smoke = ",smoke" if arg["smoke"] else ""
    config = configs.load(
        f"flow:method=dmd2,baselines={others},nfe={arg['nfe']},seed={arg['seed']}{smoke}",
        {"data.name": dataset},
    ).unlock()
    row = config.method
    if arg["smoke"]:
        row.critic_updates = 2
    else:
        row.steps = max(row.steps // _FEWER, 1)
    if arg["start"]:
        row.start = arg["start"]
        config.teacher.dir = str(Path(arg["start"]) / "teacher")
    row.learning_rate = row.critic_learning_rate = min(row.learning_rate, 1e-3)
    for name in names:
        if name in _OWN:
            config.baselines[name] = row.copy_and_resolve_references()
            config.baselines[name].update(_OWN[name])
    return config
