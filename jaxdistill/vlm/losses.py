"""All losses between a teacher and a student, of one vocabulary or of two.

Each is a pure function of arrays and returns (sum, count). Those of one vocabulary take slots of
any number of axes; those across tokenizers take one text, and `over_texts` makes of them losses of
a batch. What they need of the two tokenizers comes from `jaxdistill.vlm.align`.

Plain JAX: importable without the rest of the library.
"""

from jaxdistill.vlm.groups import Groups, whole_text
from jaxdistill.vlm.hidden_states import Projections, States, dskd_cma
from jaxdistill.vlm.likelihoods import (
    alm,
    binary_cross_entropy,
    by_boundary,
    by_teacher_boundary,
)
from jaxdistill.vlm.merged import gold, mined, next_byte_kl, over_texts, xtoken_pkl
from jaxdistill.vlm.same_vocabulary import (
    cross_entropy,
    forward_kl,
    jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    total_variation,
)
from jaxdistill.vlm.sorting import multilevel_ot, uld
from jaxdistill.vlm.vocabularies import (
    Projection,
    first_bytes,
    nearest_pieces,
    same_pieces,
    starts_with,
    token_projection,
)

__all__ = [
    "Groups",
    "Projection",
    "Projections",
    "States",
    "alm",
    "binary_cross_entropy",
    "by_boundary",
    "by_teacher_boundary",
    "cross_entropy",
    "dskd_cma",
    "first_bytes",
    "forward_kl",
    "gold",
    "jsd",
    "mined",
    "multilevel_ot",
    "nearest_pieces",
    "next_byte_kl",
    "over_texts",
    "reverse_kl",
    "same_pieces",
    "skew_kl",
    "skew_reverse_kl",
    "starts_with",
    "token_projection",
    "total_variation",
    "uld",
    "whole_text",
    "xtoken_pkl",
]
