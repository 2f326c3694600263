"""Gradient matching: DSA, and DC beside it, on any data set.

    jaxdistill --config=gradient:dataset=fashion_mnist,ipc=1 --workdir=runs/gradient1

Arguments, joined by commas behind the colon:

    dataset=    digits (default), fashion_mnist, and the rest, as in `ncfm`
    ipc=        images per class
    baselines=  rows beside it, joined by +: random+herding (default), dc, and those of `ncfm`;
                empty for none
    smoke       a run of seconds that only shows that everything works

The row `dc` is the same without augmentation. Data, networks and evaluation are those of `ncfm`. A
step is one change of the images; published are 1,000 times as many steps as images per class.

    config                             hardware     accuracy to expect (hard labels)
    gradient:dataset=digits,ipc=1      2 CPU cores, minutes; not run here to its end
    every other                        2 CPU cores or an accelerator; not run here to its end
"""

from jaxdistill import config as configs

# A tenth of the variance of the data's pixels; 0.01 where nothing is said.
_RATES = {"digits": 0.014, "mnist": 0.0095, "fashion_mnist": 0.0125, "cifar10": 0.006}
# On two CPU cores.
_STEPS = {1: 400, 10: 200}


def get_config(argument=None, dataset=None):
    """The recipe of a data set and a number of images per class."""
    arg = configs.parse_argument(
        argument, words=("smoke",), dataset="digits", ipc=1, baselines="random+herding", seed=0
    )
    dataset = arg["dataset"] if dataset is None else dataset
    names = [name for name in arg["baselines"].split("+") if name]
    others = "+".join(name for name in names if name != "dc")
    smoke = ",smoke" if arg["smoke"] else ""
    config = configs.load(
        f"ncfm:method=gradient,ipc={arg['ipc']},baselines={others},seed={arg['seed']}{smoke}",
        {"data.name": dataset},
    ).unlock()
    row = config.method
    row.learning_rate = _RATES.get(dataset, row.learning_rate)
    row.steps = _STEPS.get(arg["ipc"], row.steps)
    row.strategy = config.evals.accuracy.strategy
    if config.run.microbatch < 64:  # of the recipes for CPUs
        row.batch_real = 64
    if arg["smoke"]:
        row.steps, row.batch_real, row.outer_steps, row.inner_epochs = 4, 16, 2, 2
    if "dc" in names:
        config.baselines.dc = row.copy_and_resolve_references()
        config.baselines.dc.strategy = "none"
    return config
