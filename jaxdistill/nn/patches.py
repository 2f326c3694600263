"""Images as grids of square patches, and back."""

from jaxtyping import Array, Shaped

from jaxdistill.errors import InputError


def patchify(x: Shaped[Array, "n h w c"], patch: int) -> Shaped[Array, "n gh gw d"]:
    """Cuts images into patches, each flattened in the order (row, column, channel).

    Args:
        x: Images.
        patch: Side of a patch in pixels.

    Returns:
        The grid of patches, d = patch * patch * c.

    Raises:
        InputError: for sides that are no multiples of the patch.
    """
    n, h, w, c = x.shape
    if h % patch or w % patch:
        raise InputError(
            f"images of {h}x{w} pixels do not divide into patches of {patch}x{patch}: "
            "pad the images or choose another patch"
        )
    x = x.reshape(n, h // patch, patch, w // patch, patch, c)
    return x.swapaxes(2, 3).reshape(n, h // patch, w // patch, patch * patch * c)


def unpatchify(tokens: Shaped[Array, "n gh gw d"], patch: int) -> Shaped[Array, "n h w c"]:
    """The inverse of `patchify`; c = d / patch**2."""
    n, gh, gw, d = tokens.shape
    x = tokens.reshape(n, gh, gw, patch, patch, d // patch**2)
    return x.swapaxes(2, 3).reshape(n, gh * patch, gw * patch, -1)
