"""GenRecal: a small vision-language model taught by a large one with another tokenizer.

    jaxdistill --config=genrecal:dataset=fashion_mnist --workdir=runs/genrecal

Arguments, joined by commas behind the colon:

    dataset=    digits (default), fashion_mnist or another labelled set, whose images stand in
                grids of four that questions are asked about; pairs_448 for --mode=compile: the
                published sizes, 8 billion parameters taught by 78
    method=     genrecal (default), sft, blind, sequence_kd; a loss between tokenizers: uld,
                multilevel_ot, mined, gold, gold_hybrid, pkl, alm, dskd; or one of a single
                tokenizer: forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, total_variation,
                gkd, minillm, distillm, llava_kd
    baselines=  rows beside it, joined by +: sft (default); empty for none
    tokenizers= two (default), or one: the student reads as the teacher does. With a method of a
                single tokenizer it is one
    patches=    two (default), or one: images become as many tokens for the student as for the
                teacher. With llava_kd it is one
    smoke       a run of seconds that only shows that everything works

The teacher reads byte pairs, which `pip install "jaxdistill[vlm]"` brings, and small patches, the
student characters and large ones; both are trained here first. Rows: `genrecal` in three stages,
`sft` as many steps of fine-tuning alone, `blind` the same from nothing and without images,
`sequence_kd` on the teacher's answers in place of those of the data, `llava_kd` in three stages of
its own; the others are fine-tuned with the loss of that name beside the cross-entropy. As the
method they are rows called by their module: `supervised`, `across`, `logits`. `gkd`, `minillm` and
`distillm` learn from what the student writes as well.

    config                           hardware
    genrecal:dataset=digits          2 CPU cores, not run here to its end
    genrecal:dataset=fashion_mnist   2 CPU cores, not run here to its end
"""

import ml_collections

from jaxdistill.config import parse_argument
from jaxdistill.errors import InputError

_QWEN = {"width": 8192, "depth": 80, "heads": 64, "kv_heads": 8, "hidden": 29_568}
_INTERNLM = {"width": 4096, "depth": 32, "heads": 32, "kv_heads": 8, "hidden": 14_336}
# A student's patches are as large as an image of the grid.
_RECIPES = {
    "digits": {"teacher": {"patch": 4}, "student": {"patch": 8}},
    "fashion_mnist": {"teacher": {"patch": 14}, "student": {"patch": 28}},
    # InternVL2.5-8B from InternVL2.5-78B, whose images of 448 pixels are 256 tokens.
    "pairs_448": {
        "teacher": {"patch": 28, "tokenizer": "ids:151674", **_QWEN},
        "student": {"patch": 28, "tokenizer": "ids:92553", **_INTERNLM},
        "model": {
            "rope_theta": 1e6,
            "dtype": "bfloat16",
            "param_dtype": "bfloat16",
            "remat": True,
        },
        "parallel": {"fully_sharded": True},
    },
}
_LOSSES = ("uld", "multilevel_ot", "mined", "gold", "gold_hybrid", "pkl", "alm")
_DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_kl",
    "skew_reverse_kl",
    "total_variation",
)
# As published for MinED: half of it beside half of the cross-entropy, logits divided by two.
_HALF = {"weight": 0.5, "sft": 0.5, "temperature": 2.0}
# Methods that compare token by token.
_SINGLE = (*_DIVERGENCES, "gkd", "logits", "minillm", "distillm", "llava_kd")
_START = 1000  # steps of what all students but the blind start from
_STAGES = {
    "genrecal": {"align": 700, "distil": 1300, "tune": 700},
    "llava_kd": {"pretrain": 800, "tune": 950, "distil": 950},
}


def get_config(argument=None, dataset=None, method=None):
    """The recipe of a data set."""
    arg = parse_argument(
        argument,
        words=("smoke",),
        dataset="digits",
        method="genrecal",
        baselines="sft",
        tokenizers="",
        patches="",
        seed=0,
    )
    # What the command line says of data and method goes before the argument.
    dataset = arg["dataset"] if dataset is None else dataset
    method = arg["method"] if method is None else method
    recipe = _RECIPES.get(dataset, _RECIPES["fashion_mnist"])

    config = ml_collections.ConfigDict()
    config.family = "vlm"
    config.seed = arg["seed"]

    config.data = ml_collections.ConfigDict()
    config.data.name = dataset

    config.teacher = ml_collections.ConfigDict()
    config.teacher.tokenizer = "bytes" if arg["smoke"] else "bpe:420"
    config.student = ml_collections.ConfigDict()
    for group, values in recipe.items():
        config[group] = ml_collections.ConfigDict({**config.get(group, {}), **values})
    for name in ("tokenizers", "patches"):
        if arg[name] not in ("", "one", "two"):
            raise InputError(f"{name}={arg[name]}: give one or two")
    if (arg["patches"] or ("one" if method == "llava_kd" else "two")) == "one":
        config.student.patch = config.teacher.patch
    config.student.steps = _START
    if (arg["tokenizers"] or ("one" if method in _SINGLE else "two")) == "one":
        config.student.tokenizer = config.teacher.tokenizer

    config.run = ml_collections.ConfigDict()
    config.run.chunk = 1 if dataset == "pairs_448" else 10
    config.run.checkpoint_every = 500

    steps = sum(_STAGES["genrecal"].values())
    rows = {
        **{name: {"name": name, **stages} for name, stages in _STAGES.items()},
        "sft": {"name": "supervised", "steps": steps},
        "sequence_kd": {"name": "supervised", "steps": steps, "answers": "teacher"},
        "blind": {"name": "supervised", "steps": steps + _START, "blind": True},
        **{loss: {"name": "across", "steps": steps, "loss": loss} for loss in _LOSSES},
        "mined": {"name": "across", "steps": steps, "loss": "mined", **_HALF},
        "dskd": {"name": "dskd", "steps": steps},
        **{d: {"name": "logits", "steps": steps, "divergence": d} for d in _DIVERGENCES},
        # Half of the answers are the student's own, as its authors' default is.
        "gkd": {"name": "logits", "steps": steps, "divergence": "jsd", "on_policy": 0.5},
        "minillm": {"name": "minillm", "steps": steps},
        "distillm": {"name": "distillm", "steps": steps},
    }

    def row(name):
        return ml_collections.ConfigDict(rows.get(name, {"name": name}))

    config.method = row(method)
    config.baselines = ml_collections.ConfigDict(sort_keys=False)
    for name in filter(None, arg["baselines"].split("+")):
        if name != method:
            config.baselines[name] = row(name)

    config.evals = ml_collections.ConfigDict()
    config.evals.answers = ml_collections.ConfigDict({"name": "answers"})
    if "genrecal" in (method, *config.baselines):
        config.evals.recalibration = ml_collections.ConfigDict({"name": "recalibration"})

    if arg["smoke"]:
        config.data.train, config.data.teacher_train = 64, 128
        config.data.validation = config.data.test = 40
        for model in (config.teacher, config.student):
            model.width, model.depth, model.heads, model.kv_heads, model.hidden = 16, 1, 2, 1, 32
            model.steps, model.batch_size = 4, 8
        config.run.chunk, config.run.checkpoint_every = 2, 2
        for row in (config.method, *config.baselines.values()):
            row.batch_size = 8
            row.update(dict.fromkeys(_STAGES[row.name], 2) if row.name in _STAGES else {"steps": 6})
            if row.name == "distillm":
                # So that it writes, and draws from a full buffer.
                row.update({"own_texts": 0.9, "capacity": 16, "validate_every": 2})
        for evaluation in config.evals.values():
            evaluation.batch_size = 20
    return config
