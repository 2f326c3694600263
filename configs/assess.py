"""The data before they are distilled: hard, doubtful, double and rare images, in one report.

    jaxdistill --config=assess:dataset=digits --workdir=runs/assessed

Arguments, joined by commas behind the colon:

    dataset=    digits (default), fashion_mnist, any other data set, or a path, as in `ncfm`
    runs=       networks of each of the two folds (1); more make every score steadier
    epochs=     how long each is trained (20)
    ipc=        images a class, on the average, of the budgets that are proposed (10)
    smoke       a run of seconds that only shows that everything works

The report is `assessment/` in the workdir: `assessment.md` to be read, `assessment.json`,
`scores.npz` and pictures. The row of the run is one random image a class, for a run has one; the
evaluation `assess` looks at none, and may stand beside others in any config of this family.

    config                          hardware
    assess:dataset=digits           2 CPU cores
    2,000 images of Fashion-MNIST   2 CPU cores; what it finds and takes is in docs/assess.md
    every other data set            not run here
"""

from jaxdistill import config as configs


def get_config(argument=None, dataset=None):
    """The assessment of a data set, by networks of the shape that its recipe has."""
    arg = configs.parse_argument(
        argument, words=("smoke",), dataset="digits", runs=1, epochs=20, ipc=10, seed=0
    )
    config = configs.based("ncfm:method=random,ipc=1,baselines=", arg, dataset)
    config.evals = {
        "assessment": {
            "name": "assess",
            "runs": arg["runs"],
            "epochs": 2 if arg["smoke"] else arg["epochs"],
            "batch_size": config.pool.batch_size,
            "learning_rate": config.pool.learning_rate,
            "ipc": arg["ipc"],
        }
    }
    return config
