"""The picture of a set: every image in its place, whatever their number and size."""

import numpy as np
import pytest

from jaxdistill.errors import InputError
from jaxdistill.io import pictures
from jaxdistill.io.pictures import grid, matrix
from tests.io.test_artifact import _digits


def _enlarged(image: np.ndarray, factor: int) -> np.ndarray:
    pixels = np.rint(image * 255).astype(np.uint8)
    return np.kron(pixels, np.ones((factor, factor, 1), np.uint8)) * np.ones(3, np.uint8)


def _first_column(picture: np.ndarray, tile: np.ndarray, y: int = 16) -> int:
    """Where the uppermost row of images starts."""
    height, width = tile.shape[:2]
    (x,) = (
        x
        for x in range(picture.shape[1] - width + 1)
        if np.array_equal(picture[y : y + height, x : x + width], tile)
    )
    return x


def test_grid_shows_every_pixel_in_rows_by_class():
    digits = _digits(8)
    shuffle = np.random.default_rng(0).permutation(80)
    images, labels = digits.images[shuffle], digits.labels[shuffle]
    picture = grid(images, labels, digits.card["class_names"])
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    first = _first_column(picture, _enlarged(images[labels == 0][0], 8))
    covered = np.zeros(picture.shape[:2], bool)
    for label in range(10):
        for column, image in enumerate(images[labels == label]):
            y, x = 16 + 70 * label, first + 66 * column
            np.testing.assert_array_equal(picture[y : y + 64, x : x + 64], _enlarged(image, 8))
            covered[y : y + 64, x : x + 64] = True
    # Names are dark on white, left of the images, and touch neither them nor the edge.
    assert (picture[:, first:][~covered[:, first:]] == 255).all()
    left = picture[:, :first]
    assert (left[:, :8] == 255).all() and (left[:, -6:] == 255).all()
    for row in range(10):
        assert left[16 + 70 * row : 16 + 70 * row + 64].min() < 80


def test_grid_keeps_colours():
    images = np.zeros((2, 8, 8, 3), np.float32)
    images[0, ..., 0] = np.linspace(0, 1, 8)
    images[1, ..., 2] = np.linspace(0, 1, 8)[:, None]
    picture = grid(images, np.int32([0, 0]))
    first = _first_column(picture, _enlarged(images[0], 12))
    second = picture[16 : 16 + 96, first + 98 : first + 98 + 96]
    np.testing.assert_array_equal(second, _enlarged(images[1], 12))


def test_grid_wraps_and_thins_evenly():
    image = np.broadcast_to(
        np.linspace(0.1, 0.9, 1000, dtype=np.float32)[:, None, None, None], (1000, 64, 64, 1)
    )
    picture = grid(image, np.repeat(np.arange(2), 500))
    middles = picture[16 + 32 :: 66, :, 0]
    shown = sorted({int(v) for v in middles.flat if 25 <= v <= 230})
    assert (shown[0], shown[-1]) == (26, 229) and len(shown) > 150
    assert picture.shape[1] < 20 * 66 + 100


@pytest.mark.parametrize("classes", [1, 7, 100, 1000])
def test_grid_of_many_classes_is_not_clipped(classes):
    names = [f"a long class name, {'very ' * (c % 20)}long {c}" for c in range(classes)]
    images = np.zeros((classes, 28, 28, 1), np.float32)
    picture = grid(images, np.arange(classes), names)
    assert max(picture.shape) < 5000
    edges = [picture[:8], picture[-8:], picture[:, :8], picture[:, -8:]]
    assert all((edge == 255).all() for edge in edges)
    black = (picture == 0).all(2).sum()
    side = 84 if classes <= 50 else 56
    assert black == min(classes, 400) * side * side


@pytest.mark.parametrize("shape", [(1, 1, 1), (300, 3, 2), (1, 500, 3), (224, 224, 3)])
def test_grid_of_odd_sizes(shape):
    images = np.full((3, *shape), 0.5, np.float32)
    picture = grid(images, np.int32([4, 4, 9]), [""] * 10)
    grey = (picture == 128).all(2)
    assert grey.sum() % 3 == 0 and grey.any() and (grey | (picture == 255).all(2)).all()
    assert picture.shape[0] < 600 and picture.shape[1] < 900


def test_grid_wants_a_name_for_every_label():
    with pytest.raises(InputError, match="labels hold 2 but class_names are 2"):
        grid(np.zeros((1, 8, 8, 1), np.float32), np.int32([2]), ["a", "b"])


def test_a_matrix_is_red_where_it_agrees_and_blue_where_it_does_not():
    drawn = matrix(np.array([[1.0, 0.0], [-1.0, 0.5]]), "ours", "theirs").astype(int)
    # Near the corner of a cell, where no digit stands.
    cells = [[drawn[12 + 22 + 40 * i + 4, 12 + 40 * j + 4] for j in range(2)] for i in range(2)]
    (one, none), (other, half) = cells
    assert one[0] > 150 > one[2] and other[2] > 150 > other[0]
    assert (none >= 250).all() and one[2] < half[2] < none[2]


def test_images_found_for_texts_stand_in_order_and_the_right_one_is_framed():
    images = np.stack([np.full((8, 8, 3), 40 * i, np.uint8) for i in range(5)])
    drawn = pictures.found(images, ["a text", "another " * 30], [[3, 1], [0, 2]], [1, 4])
    red = (drawn == (200, 60, 40)).all(-1)
    rows = np.flatnonzero(red.any(1))
    columns = np.flatnonzero(red.any(0))
    # One frame, around the second image of the first row: 64 pixels and two on either side.
    assert len(rows) == len(columns) == 68
    inside = drawn[rows[34], columns[34]]
    assert inside.tolist() == [40, 40, 40]
    assert drawn[rows[34], columns[34] - 74].tolist() == [120, 120, 120]
