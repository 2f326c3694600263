"""A compact vision-language model: patches, a projector and a decoder."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.errors import InputError
from jaxdistill.nn.decoder import (
    Blocks,
    BlockShape,
    Cache,
    RMSNorm,
    causal_mask,
    positions_of,
)
from jaxdistill.nn.patches import patchify

_PARTS = {
    "vision": ("vision", "places"),
    "projector": ("projector_0", "projector_1"),
    "embedding": ("embedding", "output"),
    "body": ("body", "norm"),
}


def _sums_in_float32(left, right, dimensions, precision=None, **others):
    """A product whose sums have float32, and stay so."""
    del others
    return lax.dot_general(left, right, dimensions, precision, preferred_element_type=jnp.float32)


class VLM(nn.Module):
    """Reads an image and then a text, and says which token comes next.

    It is two functions: `encode`, of images and tokens to the last hidden states, and `head`, of
    hidden states to logits; the final norm belongs to the first, unless it is asked for in the
    second. Most of what is made of it needs no more, so a model of another library is one that is
    given as functions; see `jaxdistill.task.Language`.

    Attributes:
        vocabulary: Number of tokens.
        block: What a decoder block is like.
        depth: Number of blocks.
        patch: Side of a square of pixels that becomes a token.
        image_shape: (h, w, c).
        tied: Whether the head is the table of embeddings.
        norm_in_head: Whether the final norm is the head's.
    """

    vocabulary: int
    block: BlockShape
    depth: int
    patch: int
    image_shape: tuple[int, int, int]
    tied: bool = False
    norm_in_head: bool = False

    def setup(self):
        """Builds the layers."""
        if any(side % self.patch for side in self.image_shape[:2]):
            raise InputError(
                f"images of {self.image_shape[:2]} do not divide into patches of {self.patch}"
            )
        width, init = self.block.width, nn.initializers.normal(0.02)
        types = {"dtype": self.block.dtype, "param_dtype": self.block.param_dtype}
        self.vision = nn.Dense(width, **types)
        self.places = self.param("places", init, (self.image_tokens, width), self.block.param_dtype)
        self.projector = (nn.Dense(width, **types), nn.Dense(width, **types))
        self.embedding = nn.Embed(self.vocabulary, width, embedding_init=init, **types)
        self.body = Blocks(self.block, self.depth)
        self.norm = RMSNorm(self.block.epsilon, self.block.param_dtype)
        if not self.tied:
            sums = {"dot_general": _sums_in_float32}
            self.output = nn.Dense(
                self.vocabulary, use_bias=False, kernel_init=init, **sums, **types
            )

    @property
    def image_tokens(self) -> int:
        """The number of tokens that an image becomes."""
        height, width, _ = self.image_shape
        return (height // self.patch) * (width // self.patch)

    def look(self, images: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
        """The tokens of images."""
        patches = patchify(images, self.patch).reshape(images.shape[0], self.image_tokens, -1)
        x = nn.gelu(self.vision(patches)) + self.places.astype(patches.dtype)
        return self.projector[1](nn.gelu(self.projector[0](x)))

    def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """The embeddings of tokens, as they enter the decoder."""
        return self.embedding(tokens)

    def encode(
        self,
        images: Float[Array, "b h w c"],
        tokens: Int[Array, "b t"],
        there: Bool[Array, "b t"],
    ) -> Float[Array, "b s d"]:
        """The last hidden states of image and text.

        Args:
            images: float32, of `image_shape`.
            tokens: Ids; what they are where `there` is false changes nothing.
            there: Which tokens are no padding.
        """
        x, there = self._joined(images, tokens, there)
        x, _ = self.body(x, positions_of(there), causal_mask(there))
        return self._ended(x)

    def prefill(
        self,
        images: Float[Array, "b h w c"],
        tokens: Int[Array, "b t"],
        there: Bool[Array, "b t"],
        cache: Cache,
    ) -> tuple[Float[Array, "b s d"], Cache]:
        """As `encode`, with keys and values kept at the begin of a cache."""
        x, there = self._joined(images, tokens, there)
        room = cache.keys.shape[2] - there.shape[1]
        mask = jnp.pad(causal_mask(there), ((0, 0), (0, 0), (0, room)))
        x, cache = self.body(x, positions_of(there), mask, cache)
        return self._ended(x), cache

    def advance(
        self,
        tokens: Int[Array, " b"],
        positions: Int[Array, " b"],
        seen: Bool[Array, "b s"],
        cache: Cache,
        at: Int[Array, ""],
    ) -> tuple[Float[Array, "b d"], Cache]:
        """The hidden state of one more token.

        Args:
            tokens: Ids.
            positions: Their places.
            seen: Which places of the cache it may look at, its own among them.
            cache: Keys and values of what came before.
            at: Where in the cache it is written.
        """
        x = self.embedding(tokens[:, None])
        x, cache = self.body(x, positions[:, None], seen[:, None, :], cache, at)
        return self._ended(x)[:, 0], cache

    def head(self, hidden: Float[Array, "... d"]) -> Float[Array, "... v"]:
        """Logits, float32, of sums in float32 whatever is multiplied."""
        if self.norm_in_head:
            hidden = self.norm(hidden)
        if not self.tied:
            return self.output(hidden).astype(jnp.float32)
        table = self.embedding.embedding.astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)

    def __call__(
        self,
        images: Float[Array, "b h w c"],
        tokens: Int[Array, "b t"],
        there: Bool[Array, "b t"],
    ) -> Float[Array, "b s v"]:
        """The logits of every place."""
        return self.head(self.encode(images, tokens, there))

    def _ended(self, x):
        return x if self.norm_in_head else self.norm(x)

    def _joined(self, images, tokens, there):
        x = jnp.concatenate([self.look(images), self.embedding(tokens)], axis=1)
        image = jnp.ones((tokens.shape[0], self.image_tokens), bool)
        return x, jnp.concatenate([image, there], axis=1)


def part_of(path: tuple[Any, ...]) -> str:
    """What a parameter of a `VLM` belongs to: `vision`, `projector`, `embedding` or `body`.

    Args:
        path: As `jax.tree_util` gives it.

    Raises:
        InputError: If it is none of a `VLM`'s.
    """
    name = str(getattr(path[0], "key", path[0]))
    for part, names in _PARTS.items():
        if name in names:
            return part
    raise InputError(f"no part of a vision-language model is called {name}")
