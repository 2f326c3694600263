"""What stands between a method and a run: the task that a method is for, and its recipe for it.

A method's module ends with `recipe(task, *, keywords...) -> Recipe`. The task says what a method
may know of its surroundings, as plain values and functions; the recipe says what a run needs to
know of the method. Neither knows a file, a flag, a config or the runner.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, PyTree

from jaxdistill.method import Batch, BatchSpec, Frozen, Method, State


class Part(NamedTuple):
    """Something that is read, or made first where it must be: a pool, a teacher, a table.

    Attributes:
        shapes: Its tree, as `jax.ShapeDtypeStruct`s: enough to compile a program.
        load: Gives the tree. It may take hours the first time, and is read from then on.
    """

    shapes: PyTree = ()
    load: Callable[[], PyTree] = tuple


class Stored(NamedTuple):
    """Something on disk that a method begins from.

    Attributes:
        load: Gives its tree.
        sha256: Gives the checksum of it.
    """

    load: Callable[[], PyTree]
    sha256: Callable[[], str]


class Network(NamedTuple):
    """A classifier as functions of its parameters.

    Attributes:
        init: `key -> params`.
        logits: `(params, images) -> logits`, of normalized images (n, h, w, c).
        features: `(params, images) -> features` (n, feature_dim), of the layer before the last.
        feature_dim: The length of a feature vector.
    """

    init: Callable[[Array], PyTree]
    logits: Callable[[PyTree, Array], Array]
    features: Callable[[PyTree, Array], Array]
    feature_dim: int


class Embedding(NamedTuple):
    """Images as vectors that are summed over the data; drawn without them.

    Attributes:
        draw: `release -> parameters`, the same in each process and each run.
        apply: `(parameters, images) -> vectors` (n, dim), of length 1 at most, of uint8 images or
            such in [0, 1]; what belongs to an image depends on no other.
        dim: The length of a vector.
    """

    draw: Callable[[Any], PyTree]
    apply: Callable[[PyTree, Array], Array]
    dim: int


class CondenseTask(NamedTuple):
    """Labelled images that are to be distilled into a few.

    Attributes:
        name: The name of the data set.
        num_classes: Number of classes.
        image_shape: (h, w, c).
        class_sizes: Training images of each class, and its name for messages.
        normalize: uint8 images, or images in [0, 1], to normalized ones.
        network: The extractors' network.
        extractors: `{"initial": params, "trained": params}`, each leaf stacked over networks.
        train: The training split: `{"images": uint8 (n, h, w, c), "labels": int32 (n,)}`, and the
            positions of each class, `"index": int32 (classes, m)`, of which the first
            `"counts": int32 (classes,)` are its own and the others repeat them.
        examples: What the steps' batches are drawn from: `{"images": ...}` by class.
        microbatch: Images in one pass of a network, on each device.
        distilled: `path -> (images, labels)` of a distilled set on disk, to start from.
        trajectories: `(settings, first, snapshots) -> Part`: what networks of that shape are after
            each epoch of a training on the real images, `{"trajectory": (snapshots, parameters)}`
            for each, from the epoch `first` on; see `condense.trajectory.Experts`.
        released: `(settings, embedding, known) -> Part`: noisy sums of an embedding over the
            classes, `{"sums": (releases, classes, dim), "counts": (releases, classes)}`, where
            `known` identifies the embedding; see `condense.released.Release`.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    class_sizes: tuple[tuple[int, str], ...]
    normalize: Callable[[Array], Array]
    network: Network
    extractors: Part
    train: Part
    examples: Part
    microbatch: int
    distilled: Callable[[str], tuple[Any, Any]]
    trajectories: Callable[[Any, int, int], Part]
    released: Callable[[Any, Embedding, list[Any]], Part]

    @property
    def smallest_class(self) -> tuple[int, str]:
        """Training images of the smallest class, and its name for messages."""
        return min(self.class_sizes, key=lambda size: size[0])


class Towers(NamedTuple):
    """Two networks into one space, images and texts, as functions of their parameters.

    Attributes:
        init: `key -> params` of both.
        image: `(params, images) -> vectors` (n, d) of length one, of normalized images.
        text: `(params, vectors) -> vectors` (..., d) of length one, of the encoder's vectors.
        features: `(params, images) -> features` (n, feature_dim) of the layer before the last.
        feature_dim: The length of a feature vector.
    """

    init: Callable[[Array], PyTree]
    image: Callable[[PyTree, Array], Array]
    text: Callable[[PyTree, Array], Array]
    features: Callable[[PyTree, Array], Array]
    feature_dim: int


class PairsTask(NamedTuple):
    """Images with sentences that are to be distilled into a few pairs.

    Attributes:
        name: The name of the data.
        image_shape: (h, w, c).
        text_dim: Length of a text's vector.
        count: Training images.
        normalize: uint8 images, or images in [0, 1], to normalized ones.
        towers: The observers' networks.
        observers: Their parameters, trained on all pairs, each leaf stacked over them.
        train: The training split: `{"images": uint8 (n, h, w, c), "texts": float32 (n, most, d),
            "counts": int32 (n,)}`; of an image's texts the first `counts` are its own and the
            others repeat them.
        examples: Nothing: methods look at the whole split.
        microbatch: Images in one pass of a network.
    """

    name: str
    image_shape: tuple[int, int, int]
    text_dim: int
    count: int
    normalize: Callable[[Array], Array]
    towers: Towers
    observers: Part
    train: Part
    examples: Part
    microbatch: int


class FlowTask(NamedTuple):
    """A teacher that makes examples from noise in many steps, to be followed in a few.

    Attributes:
        name: The name of the data.
        shape: (h, w, c) of an example.
        num_classes: 0 where there are no labels.
        shift: How far the noise levels are shifted; see `jaxdistill.flow.paths.shifted`.
        batches: `size -> BatchSpec`: what a step is fed that needs real examples.
        data: `batch -> (examples, labels)`, in the units of the flow; images lie in [-1, 1].
        trunk: The module of the teacher's network, with the methods `features` and `__call__`.
        velocity: `(frozen, x, t, label) -> u`, the teacher's, guidance included, where
            `frozen["teacher"]` has its parameters.
        nfe: Network calls of one of its velocities.
        plain: As `velocity`, without guidance.
        guidance: The scale of the guidance in `velocity`; 1 for none.
        null: The label that says nothing, where the teacher has learned one.
        teacher: `{"teacher": params}`.
        examples: What the steps' batches are drawn from, where they need real examples.
        student: `(folder, shapes, alpha) -> Stored`: what another student of this teacher has
            learned, on adapters of that scale times their rank.
        specs: `(tree, mesh) -> PyTree`: how large trees are laid out on the devices.
        as_velocity: `(x, t, output) -> u`: what the network's last layer says there, as a velocity.
            The output may have further axes, x then too.
    """

    name: str
    shape: tuple[int, int, int]
    num_classes: int
    shift: float
    batches: Callable[[int], BatchSpec]
    data: Callable[[Batch], tuple[Array, Array]]
    trunk: Any
    velocity: Callable[[Frozen, Array, Array, Array], Array]
    nfe: int
    plain: Callable[[Frozen, Array, Array, Array], Array]
    guidance: float
    null: int | None
    teacher: Part
    examples: Part
    student: Callable[[str, PyTree, float], Stored]
    specs: Callable[[PyTree, Any], PyTree]
    as_velocity: Callable[[Array, Array, Array], Array] = lambda x, t, output: output


class Language(NamedTuple):
    """A vision-language model as functions of its parameters.

    A model of another library is one once it is given so. Losses ask for `encode` and `head`
    alone, and DSKD for `embed`; GenRecal builds its Recalibrator like a `block` of the student.
    Methods of several stages train parameters by what `part` says of them.

    Attributes:
        init: `key -> params`.
        encode: `(params, images, tokens, there) -> hidden` (b, image_tokens + t, width): the last
            hidden states, final norm included, of an image and the text behind it, both padded.
        head: `(params, hidden) -> logits` (..., vocabulary), float32.
        embed: `(params, tokens) -> embeddings` (b, t, width), as they enter the decoder.
        generate: `(params, images, question, there, *, keys, temperature, length, mixed) ->
            Written`; see `jaxdistill.vlm.decoding.generate`.
        writer: `params -> jaxdistill.vlm.decoding.Writer`: the model token by token, for texts that
            two models write.
        image_tokens: Places that an image takes, before the text.
        width: Length of a hidden state.
        vocabulary: Number of tokens.
        block: A `jaxdistill.nn.decoder.BlockShape`: what a decoder block is like.
        part: `path of a parameter -> vision`, `projector`, `embedding` or `body`.
        linear_head: Whether the head is a matrix and nothing else.
        slots: Tokens of an answer whose logits are there at a time, where a loss can do with some;
            0 for all.
    """

    init: Callable[[Array], PyTree]
    encode: Callable[[PyTree, Array, Array, Array], Array]
    head: Callable[[PyTree, Array], Array]
    embed: Callable[[PyTree, Array], Array]
    generate: Callable[..., Any]
    writer: Callable[[PyTree], Any]
    image_tokens: int
    width: int
    vocabulary: int
    block: Any
    part: Callable[[tuple[Any, ...]], str]
    linear_head: bool = True
    slots: int = 0


class VLMTask(NamedTuple):
    """A large vision-language model whose answers a small one is to give.

    Attributes:
        name: The name of the questions.
        teacher_model: The large one.
        student_model: The small one.
        pair: `batch -> TokenisedPair`: images, questions and answers under both tokenizers.
        batches: `size -> BatchSpec`: what a step is fed.
        teacher: `{"teacher": params}`.
        start: `{"teacher": params, "student": params}`, where students start from.
        examples: What the steps' batches are drawn from.
        read: The same, with what the teacher has made of them where that is kept; for methods that
            need it for the data's own answers.
        answered: The same with the teacher's answers in the place of those of the data.
        validation: `{"validation": examples}`, which no student learns from, each array as it is in
            a batch.
        answer_length: Tokens of the longest answer: the teacher's, the student's.
        pieces: By side, `teacher` or `student`: the bytes of each of its tokens, or the name of a
            special one.
        encode: By side: `bytes -> ids`.
        tokenizer_sha256: By side: equal ones read texts alike.
        specs: `(tree, mesh) -> PyTree`: how large trees are laid out on the devices.
    """

    name: str
    teacher_model: Language
    student_model: Language
    pair: Callable[[Batch], Any]
    batches: Callable[[int], BatchSpec]
    teacher: Part
    start: Part
    examples: Part
    read: Part
    answered: Part
    validation: Part
    answer_length: tuple[int, int]
    pieces: Mapping[str, tuple[bytes | str, ...]]
    encode: Mapping[str, Callable[[bytes], list[int]]]
    tokenizer_sha256: Mapping[str, str]
    specs: Callable[[PyTree, Any], PyTree]


SampleFn = Callable[..., Array]
"""A student used. `(output, frozen, noise, label, *, nfe) -> examples` of a flow, with so many
calls; `(output, frozen, images, question, there, *, length) -> Written`, its answers, of a
vision-language model."""
TraceFn = Callable[..., Array]
"""`(output, frozen, noise, label, *, nfe, parts) -> (nfe * parts + 1, n, ...)`: the states on the
way, some in each segment."""


class Aside(NamedTuple):
    """What a method leaves beside its output, for evaluations that look into how it was made.

    Attributes:
        keep: `state -> PyTree`: what is written beside the artefact, a tree of arrays.
        use: What an evaluation of the method's own calls with it.
    """

    keep: Callable[[State], PyTree]
    use: Callable[..., Any]


class Recipe(NamedTuple):
    """What a method's module makes of a task and of the method's settings.

    Attributes:
        method: What is run.
        steps: Length of the run.
        frozen: What the steps are given besides the batch.
        rates: Names of the settings that a restart after divergence lowers.
        card: What the artefact says of itself beyond the settings.
        cost: `state -> dict`: what the run took, for the artefact.
        note: A line that is printed before the run.
        sample: How a student makes examples; see `SampleFn`.
        trace: The states on a student's way; see `TraceFn`.
        examples: What the steps' batches are drawn from, where it is not the task's `examples`.
        aside: What is kept beside the output; see `Aside`.
        source: What identifies that which the method begins from, beside data and teacher.
        separate: Whether nothing in the making of a class's images looks at the other classes, so
            that a part of the set is what the method makes of these classes alone.
        withholds: Whether the artefact's card leaves out what identifies the data: who guesses them
            could check it against a hash.
    """

    method: Method
    steps: int
    frozen: Part = Part()
    rates: tuple[str, ...] = ("learning_rate",)
    card: Mapping[str, Any] = {}
    cost: Callable[[State], dict[str, Any]] = lambda state: {}
    note: str = ""
    sample: SampleFn | None = None
    trace: TraceFn | None = None
    examples: Part | None = None
    aside: Aside | None = None
    source: Callable[[], dict[str, Any]] = dict
    separate: bool = False
    withholds: bool = False
