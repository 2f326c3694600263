"""Generate, then compress: a flow makes images, and a few of them, or made of them, are kept.

    jaxdistill --config=generate_compress:dataset=fashion_mnist --workdir=runs/generated

Arguments, joined by commas behind the colon:

    dataset=    digits (default), fashion_mnist, cifar10, another TFDS name, or a path, as in `flow`
    compress=   rded (default), ncfm, or another method of that family
    generator=  ucgm (default), arcflow or another student; teacher for the teacher itself
    per_class=  images made of each class (1000)
    ipc=        images kept of each class (10)
    filter=     none (default), consistent, confident, middle: see `jaxdistill.eval.generate`
    smoke       a run of seconds that only shows that everything works

First `generator/` in the workdir gets a whole run of `flow` or `ucgm`, whose evaluation `generated`
makes the images; then they are condensed, and fresh networks are trained on what is left and tested
on real images. Everything of the generator is set under `--config.generator`; with
`evals.generated.fill=True` and `real=True` there, rare classes alone are filled up. Extractors and
observers are trained on the generated images, the classifier that rejects on the real ones. Killed
at any point, the same command goes on.

    config                                    hardware
    generate_compress:dataset=digits          2 CPU cores, minutes
    generate_compress:dataset=fashion_mnist   2 CPU cores, hours; with generator=arcflow and 6,000
                                              images of each class 65.6 ± 0.2 with hard labels and
                                              77.5 ± 0.2 with the observer's (docs page)
    every other data set                      accelerator, not run here
"""

from jaxdistill import config as configs


def get_config(argument=None, dataset=None):
    """The recipe of a data set."""
    arg = configs.parse_argument(
        argument,
        words=("smoke",),
        dataset="digits",
        compress="rded",
        generator="ucgm",
        per_class=1000,
        ipc=10,
        filter="none",
        seed=0,
    )
    student = "ucgm" if arg["generator"] == "teacher" else arg["generator"]
    recipe = "ucgm:" if student == "ucgm" else f"flow:method={student},"
    generator = configs.based(f"{recipe}baselines=", arg, dataset)
    if arg["generator"] == "teacher":
        generator.method.steps = 1  # a run of flows has a student, and nobody asks this one
    generator.evals = {
        "generated": {
            "name": "generate",
            "teacher": "midpoint:16" if arg["generator"] == "teacher" else "",
            "per_class": 30 if arg["smoke"] else arg["per_class"],
            "filter": arg["filter"],
            "seed": arg["seed"],
            "judge_epochs": 1 if arg["smoke"] else 5,
        }
    }
    name = arg["compress"]
    recipe = "rded:baselines=random" if name == "rded" else f"ncfm:method={name},baselines=random"
    config = configs.based(recipe, arg, dataset, "ipc")
    config.data.name = "generated"
    config.generator = generator
    return config
