"""Trajectory matching: MTT, and DATM's growing window, on any data set.

    jaxdistill --config=trajectory:dataset=fashion_mnist,ipc=1 --workdir=runs/trajectory1

Arguments, joined by commas behind the colon:

    dataset=    digits (default), fashion_mnist, and the rest, as in `ncfm`
    ipc=        images per class
    baselines=  rows beside it, joined by +: random+herding (default), and those of `ncfm`; empty
                for none
    smoke       a run of seconds that only shows that everything works

Experts are trained first and kept in `experts/`; other runs find them there by
`--config.method.expert_dir`. Data, networks and evaluation are those of `ncfm`.

    config                               hardware
    trajectory:dataset=digits,ipc=1      2 CPU cores, minutes; not run here to its end
    every other                          2 CPU cores or an accelerator; not run here to its end
"""

from jaxdistill import config as configs

# On two CPU cores.
_STEPS = {1: 400, 10: 200}


def get_config(argument=None, dataset=None):
    """The recipe of a data set and a number of images per class."""
    arg = configs.parse_argument(
        argument, words=("smoke",), dataset="digits", ipc=1, baselines="random+herding", seed=0
    )
    dataset = arg["dataset"] if dataset is None else dataset
    rest = f"ipc={arg['ipc']},baselines={arg['baselines']},seed={arg['seed']}"
    smoke = ",smoke" if arg["smoke"] else ""
    config = configs.load(f"ncfm:method=trajectory,{rest}{smoke}", {"data.name": dataset}).unlock()
    row = config.method
    row.strategy = row.expert_strategy = config.evals.accuracy.strategy
    if config.run.microbatch < 64:  # of the recipes for CPUs
        row.steps = _STEPS.get(arg["ipc"], 100)
        row.experts, row.expert_batch_size, row.unroll = 5, 64, 10
    else:
        row.experts, row.expert_epochs, row.start_until = 100, 50, 20
    if arg["smoke"]:
        row.steps, row.unroll, row.experts, row.expert_epochs = 4, 2, 2, 2
        row.start_until = 0
    return config
