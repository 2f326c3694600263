"""Images that are differentially private with a chosen epsilon, beside such of no guarantee.

    jaxdistill --config=private:dataset=fashion_mnist,ipc=10,epsilon=1 --workdir=runs/epsilon1

Arguments, joined by commas behind the colon:

    dataset=    digits (default), fashion_mnist, and the rest, as in `ncfm`
    ipc=        images per class
    epsilon=    what is guaranteed to each example that is added or removed: 1 (default)
    delta=      the probability that is left out: 1e-5 (default); below one over the number of
                training images
    baselines=  rows beside it, joined by +: random+exact (default), direction, and those of `ncfm`;
                empty for none
    smoke       a run of seconds that only shows that everything works

The row `exact` learns from the same sums without noise, and `direction` matches what DM does, with
noise. Only the method's own row and `direction` have the guarantee, each of its own: whoever
publishes both adds their epsilons. The evaluation `copies` compares the images of every row with
the training images.

    config                             hardware     accuracy to expect (hard labels)
    private:dataset=digits             2 CPU cores, minutes; too few images a class for epsilon=1
    private:dataset=fashion_mnist,...  2 CPU cores, see docs/privacy.md
    every other                        not run here
"""

import ml_collections

from jaxdistill import config as configs


def get_config(argument=None, dataset=None):
    """The recipe of a data set, a number of images per class and a guarantee."""
    arg = configs.parse_argument(
        argument,
        words=("smoke",),
        dataset="digits",
        ipc=1,
        epsilon=1.0,
        delta=1e-5,
        baselines="random+exact",
        seed=0,
    )
    chosen = arg["baselines"].split("+")
    known = "+".join(row for row in chosen if row not in ("exact", "direction"))
    config = configs.based(f"ncfm:method=released,baselines={known}", arg, dataset, "ipc")

    exact = config.method.to_dict()
    guaranteed = exact | {"epsilon": arg["epsilon"], "delta": arg["delta"]}
    config.method = ml_collections.ConfigDict(guaranteed)
    if "exact" in chosen:
        config.baselines.exact = ml_collections.ConfigDict(exact)
    if "direction" in chosen:
        config.baselines.direction = ml_collections.ConfigDict(
            guaranteed | {"embedding": "direction"}
        )

    config.evals.copies = ml_collections.ConfigDict()
    config.evals.copies.name = "privacy"
    if arg["smoke"]:
        config.evals.copies.held_out = 20
    return config
