"""GenRecal's Recalibrator: student states to where a teacher's head can read them."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.nn.decoder import (
    Blocks,
    BlockShape,
    RMSNorm,
    causal_mask,
    positions_of,
)


class Recalibrator(nn.Module):
    """Two decoder blocks like the student's between two linear layers.

    Lee et al., "GenRecal" (arXiv 2506.15681), section 3.2. A prefix of the student's states, or of
    the teacher's, is followed by the teacher's states of the answer; what comes out has the
    teacher's width and is read by the teacher's head. Positions are counted anew.

    Attributes:
        block: A block of the student's.
        teacher_width: Length of the teacher's states.
        depth: Number of blocks.
        norm: `layer`, `rms` or `none`, of what comes out.
        hides: Whether states of the answer can be hidden, behind a vector that is learned.
    """

    block: BlockShape
    teacher_width: int
    depth: int = 2
    norm: str = "layer"
    hides: bool = False

    @nn.compact
    def __call__(
        self,
        prefix: Float[Array, "b q d"],
        prefix_there: Bool[Array, "b q"],
        answer: Float[Array, "b a teacher"],
        answer_there: Bool[Array, "b a"],
        *,
        prefix_from_teacher: bool = False,
        answer_starts: Int[Array, " b"] | None = None,
        hidden: Bool[Array, "b a"] | None = None,
    ) -> tuple[Float[Array, "b q teacher"], Float[Array, "b a teacher"]]:
        """The recalibrated states of prefix and answer, float32.

        Args:
            prefix: Last hidden states of image and question, of the student's width, or of the
                teacher's.
            prefix_there: Which of them are no padding.
            answer: The teacher's last hidden states of the answer.
            answer_there: Which of them are no padding.
            prefix_from_teacher: Whose states the prefix has.
            answer_starts: Positions of the answers' first states; by default those behind the
                prefix, as the paper has it.
            hidden: Which states of the answer are hidden; by default none.
        """
        block = self.block
        types = {"dtype": block.dtype, "param_dtype": block.param_dtype, "use_bias": False}
        init = nn.initializers.normal(0.02)
        pre = nn.Dense(block.width, kernel_init=init, name="pre", **types)
        post = nn.Dense(self.teacher_width, kernel_init=init, name="post", **types)
        if self.hides:
            mask = self.param("hidden", init, (self.teacher_width,), block.param_dtype)
            if hidden is not None:
                answer = jnp.where(hidden[..., None], mask.astype(answer.dtype), answer)
        first = pre(prefix) if prefix_from_teacher else prefix
        x = jnp.concatenate([first.astype(answer.dtype), pre(answer)], axis=1)
        there = jnp.concatenate([prefix_there, answer_there], axis=1)
        positions = positions_of(there)
        if answer_starts is not None:
            behind = answer_starts[:, None] + positions_of(answer_there)
            positions = jnp.concatenate([positions[:, : prefix.shape[1]], behind], axis=1)
        x, _ = Blocks(block, self.depth, name="body")(x, positions, causal_mask(there))
        x = post(x).astype(jnp.float32)
        if self.norm == "layer":
            x = nn.LayerNorm(name="norm")(x)
        elif self.norm == "rms":
            x = RMSNorm(block.epsilon, name="norm")(x)
        return x[:, : prefix.shape[1]], x[:, prefix.shape[1] :]
