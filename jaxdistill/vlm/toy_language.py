"""Small languages in which everything about two tokenizers can be computed exactly.

Strings have at most N bytes of a few letters, so that all of them, and all histories of tokens that
spell them, are rows of arrays. A model is a table: for each history the logits of the next token,
EOS last. Its law over byte strings sums over all tokenizations of a string, not only over the one
that the tokenizer gives (Phan et al., arXiv 2410.09303; Vieira et al., 2412.03719).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxdistill.errors import InputError
from jaxdistill.vlm.vocabularies import Piece

EOS = "eos"


@dataclasses.dataclass(frozen=True)
class ToyBPE:
    """A byte-pair tokenizer: letters, and merges by falling priority.

    Attributes:
        letters: The bytes that there are; their tokens come first.
        merges: Pairs of pieces; each makes a new one, their bytes together. EOS is the last token.
    """

    letters: bytes
    merges: tuple[tuple[bytes, bytes], ...] = ()

    @functools.cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """What each token stands for, as `jaxdistill.vlm.vocabularies` wants it."""
        return (*(bytes([b]) for b in self.letters), *(a + b for a, b in self.merges), EOS)

    @property
    def eos(self) -> int:
        """The id of EOS."""
        return len(self.pieces) - 1

    @functools.cached_property
    def _ids(self) -> dict[Piece, int]:
        return {piece: i for i, piece in enumerate(self.pieces)}

    def encode(self, text: bytes) -> tuple[int, ...]:
        """The tokens of a text: merges are applied in their order, from the left."""
        parts = [bytes([b]) for b in text]
        for pair in self.merges:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == pair:
                    parts[i : i + 2] = [parts[i] + parts[i + 1]]
                i += 1
        return tuple(self._ids[part] for part in parts)

    def decode(self, tokens: Sequence[int]) -> bytes:
        """The bytes of some tokens."""
        return b"".join(p for p in (self.pieces[t] for t in tokens) if isinstance(p, bytes))

    def spell(self, text: bytes) -> tuple[int, ...]:
        """A text in tokens of single bytes, which is no encoding but a way to write it."""
        return tuple(self._ids[bytes([b])] for b in text)


def random_bpe(
    key: PRNGKeyArray, letters: bytes, merges: int, *, longest: int = 3, opener: bytes = b""
) -> ToyBPE:
    """A tokenizer of random merges, each pair equally likely.

    Args:
        key: Random key.
        letters: Its letters.
        merges: How many it has; fewer if no more pair is left.
        longest: The most bytes of a token.
        opener: Letters that a token may only start with, as spaces are in most tokenizers.
    """
    pieces, chosen = [bytes([b]) for b in letters], []
    for step in range(merges):
        pairs = [
            (a, b)
            for a, b in itertools.product(pieces, repeat=2)
            if len(a + b) <= longest and a + b not in pieces and not set(b) & set(opener)
        ]
        if not pairs:
            break
        index = jax.random.randint(jax.random.fold_in(key, step), (), 0, len(pairs))
        chosen.append(pairs[int(index)])
        pieces.append(chosen[-1][0] + chosen[-1][1])
    return ToyBPE(letters, tuple(chosen))


class Histories(NamedTuple):
    """All strings of at most N bytes, and all histories of tokens that spell one of them.

    n histories, S strings, v tokens. Host arrays, so that programs have them as constants.

    Attributes:
        strings: The strings, shorter ones first.
        index: From a history to its number; () is 0.
        string: (n,). The string that a history spells.
        last: (n,). Its last token; EOS for the empty history.
        parents: (n, N). The histories on the way to it, then zeros.
        steps: (n, N). The token after each of them, then zeros.
        on_path: (n, N). Where there is such a step.
        children: (n, v). The history that a token makes of it, -1 if the string would be too long.
        allowed: (n, v). Which tokens may follow; EOS always, alone after N bytes.
        text_nodes: (S, N + 1). The histories in the tokenizer's encoding of a string, the one
            before EOS last, then zeros.
        text_tokens: (S, N + 1). The tokens after each of them, EOS last, then zeros.
        text_mask: (S, N + 1). Which of these there are.
        cover: Two arrays, of strings and of histories: the history spells at least the string, and
            without its last token it does not.
    """

    strings: tuple[bytes, ...]
    index: dict[tuple[int, ...], int]
    string: Int[np.ndarray, " n"]
    last: Int[np.ndarray, " n"]
    parents: Int[np.ndarray, "n N"]
    steps: Int[np.ndarray, "n N"]
    on_path: Bool[np.ndarray, "n N"]
    children: Int[np.ndarray, "n v"]
    allowed: Bool[np.ndarray, "n v"]
    text_nodes: Int[np.ndarray, "S slots"]
    text_tokens: Int[np.ndarray, "S slots"]
    text_mask: Bool[np.ndarray, "S slots"]
    cover: tuple[Int[np.ndarray, " c"], Int[np.ndarray, " c"]]


def all_strings(letters: bytes, length: int) -> tuple[bytes, ...]:
    """All strings of at most `length` letters, shorter ones first."""
    return tuple(bytes(s) for n in range(length + 1) for s in itertools.product(letters, repeat=n))


def histories(tokenizer: ToyBPE, length: int) -> Histories:
    """All histories of a tokenizer's tokens that spell at most `length` bytes."""
    strings = all_strings(tokenizer.letters, length)
    numbers = {s: i for i, s in enumerate(strings)}
    eos = tokenizer.eos
    index: dict[tuple[int, ...], int] = {(): 0}
    order, spelled = [()], [b""]
    children = []
    for history in order:  # grows while it is gone through
        text, row = spelled[index[history]], [-1] * (eos + 1)
        for token, piece in enumerate(tokenizer.pieces[:-1]):
            if len(text + piece) <= length:
                row[token] = index[(*history, token)] = len(order)
                order.append((*history, token))
                spelled.append(text + piece)
        children.append(row)
    paths = np.zeros((3, len(order), length), np.int32)
    for n, history in enumerate(order):
        for depth, token in enumerate(history):
            paths[:, n, depth] = index[history[:depth]], token, 1
    texts = np.zeros((3, len(strings), length + 1), np.int32)
    for s, string in enumerate(strings):
        tokens = tokenizer.encode(string)
        for slot, token in enumerate((*tokens, eos)):
            texts[:, s, slot] = index[tokens[:slot]], token, 1
    covers = [
        (numbers[spelled[n][:size]], n)
        for n, history in enumerate(order)
        for size in range(
            len(spelled[index[history[:-1]]]) + 1 if history else 0, len(spelled[n]) + 1
        )
    ]
    children = np.array(children, np.int32)
    allowed = children >= 0
    allowed[:, eos] = True
    return Histories(
        strings=strings,
        index=index,
        string=np.array([numbers[text] for text in spelled], np.int32),
        last=np.array([history[-1] if history else eos for history in order], np.int32),
        parents=paths[0],
        steps=paths[1],
        on_path=paths[2] > 0,
        children=children,
        allowed=allowed,
        text_nodes=texts[0],
        text_tokens=texts[1],
        text_mask=texts[2] > 0,
        cover=(np.array([c[0] for c in covers]), np.array([c[1] for c in covers])),
    )


# ------------------------------------------------------------------ tables and their laws


def log_table(tree: Histories, logits: Float[Array, "n v"]) -> Float[Array, "n v"]:
    """Log-probabilities of a table of logits; minus infinity for tokens that may not follow."""
    return jax.nn.log_softmax(jnp.where(tree.allowed, logits, -jnp.inf))


def tied(tree: Histories, logits: Float[Array, "v v"]) -> Float[Array, "n v"]:
    """The table of a model that looks at the last token alone; the row of EOS is for the start."""
    return logits[tree.last]


def path_log_probs(tree: Histories, log_q: Float[Array, "n v"]) -> Float[Array, " n"]:
    """The log-probability that a text starts with each history of tokens."""
    steps = log_q[tree.parents, tree.steps]
    return jnp.where(tree.on_path, steps, 0.0).sum(-1)


def byte_log_probs(tree: Histories, log_q: Float[Array, "n v"]) -> Float[Array, " S"]:
    """The exact log-probability of each string, over all of its tokenizations; differentiable."""
    ended = path_log_probs(tree, log_q) + log_q[:, -1]
    return _log_sums(ended, tree.string, len(tree.strings))


def prefix_log_probs(tree: Histories, log_q: Float[Array, "n v"]) -> Float[Array, " S"]:
    """The log-probability that a text starts with each string: the sum over the string's cover."""
    strings, nodes = tree.cover
    return _log_sums(path_log_probs(tree, log_q)[nodes], strings, len(tree.strings))


def canonical_mass(tree: Histories, log_q: Float[Array, "n v"]) -> Float[Array, ""]:
    """The probability that a model writes as its tokenizer would."""
    rows = log_q[tree.text_nodes, tree.text_tokens]
    return jnp.exp(jnp.where(tree.text_mask, rows, 0.0).sum(-1)).sum()


def _log_sums(values: Array, ids: np.ndarray, count: int) -> Array:
    """The logarithm of the sum of exponentials in each segment, none of which is empty."""
    most = jax.lax.stop_gradient(jax.ops.segment_max(values, ids, count))
    most = jnp.where(most > -jnp.inf, most, 0.0)
    return most + jnp.log(jax.ops.segment_sum(jnp.exp(values - most[ids]), ids, count))


def express(
    law: Float[np.ndarray, " S"],
    tree: Histories,
    encode: Callable[[bytes], tuple[int, ...]],
) -> Float[np.ndarray, "n v"]:
    """The table of log-probabilities that writes a law in one tokenization of each string.

    Args:
        law: Probabilities of the strings.
        tree: The histories.
        encode: The tokenization: `ToyBPE.encode` for what the tokenizer gives, or `ToyBPE.spell`.

    Returns:
        Exact: the law of this table is the given one. Minus infinity for what never follows; even
        over all tokens where a history never occurs.
    """
    mass, ended = np.zeros((2, len(tree.string)))
    for probability, string in zip(law, tree.strings, strict=True):
        tokens = encode(string)
        for size in range(len(tokens) + 1):
            mass[tree.index[tokens[:size]]] += probability
        ended[tree.index[tokens]] += probability
    after = np.where(tree.children >= 0, mass[tree.children], 0.0)
    after[:, -1] = ended
    after = np.where(mass[:, None] > 0, after, tree.allowed)
    with np.errstate(divide="ignore"):
        return np.log(after / after.sum(1, keepdims=True))


# ------------------------------------------------------------------ laws over byte strings


def random_kernel(key: PRNGKeyArray, letters: int) -> Float[np.ndarray, "states states"]:
    """A Markov kernel of letters, even over all, that stops with probability 0.1 to 0.3.

    Args:
        key: Random key.
        letters: How many there are.

    Returns:
        (letters + 1, letters + 1): row i is after letter i, the last row is the start; column j is
        letter j, the last column is the end. Rows sum to one.
    """
    rows, ends = jax.random.split(key)
    shares = jax.random.dirichlet(rows, jnp.ones(letters), (letters + 1,))
    stop = jax.random.uniform(ends, (letters + 1, 1), minval=0.1, maxval=0.3)
    kernel = np.asarray(jnp.concatenate([(1 - stop) * shares, stop], 1), np.float64)
    return kernel / kernel.sum(1, keepdims=True)


def byte_law(
    kernel: Float[np.ndarray, "states states"],
    letters: bytes,
    length: int,
    *,
    cut: bool = True,
) -> Float[np.ndarray, " S"]:
    """Probabilities of all strings of at most `length` letters.

    Args:
        kernel: As of `random_kernel`.
        letters: What its states are.
        length: The most bytes.
        cut: Whether strings end at that length, so that the probabilities sum to one.
    """
    state = {letter: i for i, letter in enumerate(letters)}
    found = []
    for string in all_strings(letters, length):
        way = [len(letters), *(state[b] for b in string)]
        steps = [kernel[pair] for pair in itertools.pairwise(way)]
        ended = 1.0 if cut and len(string) == length else kernel[way[-1], -1]
        found.append(float(np.prod(steps)) * ended)
    return np.array(found)


def closed_form(
    kernel: Float[np.ndarray, "states states"], tokenizer: ToyBPE
) -> tuple[Float[np.ndarray, "v v"], Float[np.ndarray, " v"]]:
    """The model of the last token alone that writes a Markov law as a BPE tokenizer would.

    With BPE a tokenization is the tokenizer's own if every token encodes to itself and every
    adjacent pair does. So with h(t) the probability that what follows t continues it properly,
    `h(t) = stop(t) + sum_u P(u | t) h(u)` over the u that may follow, and
    `q(u | t) = P(u | t) h(u) / h(t)`, `q(EOS | t) = stop(t) / h(t)`, for strings of any length.

    Args:
        kernel: As of `random_kernel`, in the order of the tokenizer's letters.
        tokenizer: Any.

    Returns:
        The table of probabilities, (v, v), in which the row of EOS is that of the start; and h,
        likewise, which is 1 for the start, since every string has one encoding.

    Raises:
        InputError: If the kernel has other letters.
    """
    if kernel.shape != (len(tokenizer.letters) + 1,) * 2:
        raise InputError(
            f"a kernel of shape {kernel.shape} for a tokenizer of {len(tokenizer.letters)} letters"
        )
    state = {letter: i for i, letter in enumerate(tokenizer.letters)}
    size = tokenizer.eos + 1
    pieces = [p for p in tokenizer.pieces if isinstance(p, bytes)]
    at = [*(state[p[-1]] for p in pieces), len(tokenizer.letters)]
    follows = np.zeros((size, size))
    for before, u in itertools.product(range(size), range(size - 1)):
        own = () if before == tokenizer.eos else (before,)
        if tokenizer.encode(tokenizer.decode((*own, u))) == (*own, u):
            way = [at[before], *(state[b] for b in pieces[u])]
            follows[before, u] = np.prod([kernel[pair] for pair in itertools.pairwise(way)])
    stop = kernel[at, -1]
    # EOS is only ever the start of these rows, and nothing follows on it: its column is zero.
    h = np.linalg.solve(np.eye(size) - follows, stop)
    table = follows * h[None, :] / h[:, None]
    table[:, -1] = stop / h
    return table, h
