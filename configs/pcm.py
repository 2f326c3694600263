"""PCM: students that end each phase of the way from noise to data in one call.

    jaxdistill --config=pcm:dataset=fashion_mnist --workdir=runs/pcm

Arguments, joined by commas behind the colon:

    dataset=    soft4 (default) and other points, digits, fashion_mnist, and the rest, as in `flow`
    baselines=  rows beside it, joined by +: progressive (default), adversarial, consistency, and
                those of `flow`; empty for none
    nfe=        phases, and network calls of the student (2)
    smoke       a run of seconds that only shows that everything works

The row `adversarial` is PCM with a discriminator, `consistency` has one phase and fresh noise
between its calls. Data, teacher, network and budget are those of `flow`. What it makes is what
`dmd2` best starts from: give its workdir as `start=` there.

    config                              hardware
    pcm:dataset=soft4 and other points  2 CPU cores, minutes
    pcm:dataset=fashion_mnist           2 CPU cores, hours; not run here to its end
"""

from jaxdistill import config as configs

_OWN = {"adversarial": {"adversarial": 0.1}, "consistency": {"whole": True}}


def get_config(argument=None, dataset=None):
    """The recipe of a data set."""
    arg = configs.parse_argument(
        argument, words=("smoke",), dataset="soft4", baselines="progressive", nfe=2, seed=0
    )
    dataset = arg["dataset"] if dataset is None else dataset
    names = [name for name in arg["baselines"].split("+") if name]
    others = "+".join(name for name in names if name not in _OWN)
    smoke = ",smoke" if arg["smoke"] else ""
    config = configs.load(
        f"flow:method=pcm,baselines={others},nfe={arg['nfe']},seed={arg['seed']}{smoke}",
        {"data.name": dataset},
    ).unlock()
    for name in names:
        if name in _OWN:
            config.baselines[name] = config.method.copy_and_resolve_references()
            config.baselines[name].update(_OWN[name])
    return config
