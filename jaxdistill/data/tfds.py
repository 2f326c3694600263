"""Data sets of TFDS, read through its data sources: without TensorFlow."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.data.dataset import Dataset, from_arrays
from jaxdistill.data.resize import check_pixels, resize, stack, unequal
from jaxdistill.errors import InputError
from jaxdistill.io.reading import one_line

_OTHER_WAYS = "or give the path of an image folder, an IDX folder or an .npz file"


def read(
    name: str, data_dir: Path | None, image_size: int | None, other_ways: str = _OTHER_WAYS
) -> Dataset:
    """Read a data set of TFDS that lies prepared on disk, preparing it where that works.

    Args:
        name: As TFDS knows it, perhaps with a configuration after a slash.
        data_dir: Where it lies; the folder of TFDS if None.
        image_size: Resize the images to this; needed when they differ in size.
        other_ways: What the message says that one can do instead.

    Raises:
        InputError: If TFDS does not know it or cannot read it, or it has not what is needed.
    """
    builder = _builder(name, data_dir, other_ways)
    splits = list(builder.info.splits)
    test_split = next((s for s in ("test", "validation") if s in splits), None)
    if "train" not in splits or test_split is None:
        raise InputError(
            f"TFDS data set {name} has the splits {', '.join(splits)}; "
            "needed are train and test (or validation)"
        )
    arrays = []
    for split in ("train", test_split):
        arrays.extend(_read_split(builder, name, split, image_size))
    names = getattr(builder.info.features["label"], "names", None)
    return from_arrays(*arrays, name=name, class_names=names)


def is_builtin(name: str) -> bool:
    """Whether TFDS itself has a data set of this name."""
    return name in _import_tfds().list_builders(with_community_datasets=False)


def _builder(name: str, data_dir: Path | None, other_ways: str) -> Any:
    """The builder of a data set that lies prepared on disk, preparing it where that works."""
    tfds = _import_tfds()
    # The command stands on one line, whatever the name: it is there to be copied.
    command = f"tfds build {name} --file_format=array_record"
    if data_dir is not None:
        command += f" --data_dir={data_dir}"
    advice = f"prepare it once where TensorFlow is installed with `{command}`, {other_ways}"
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        if not builder.is_prepared():
            # The built-in recipes unpack and read their downloads through TensorFlow. Without it
            # they would fetch everything first and fail afterwards.
            if importlib.util.find_spec("tensorflow") is None and type(
                builder
            ).__module__.startswith("tensorflow_datasets."):
                raise InputError(
                    f"data set {name} was not found in {data_dir or 'the TFDS folder'}; {advice}"
                )
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
            builder.download_and_prepare()
        builder.as_data_source("train")
    except tfds.core.registered.DatasetNotFoundError as error:
        folder = f" (for the folder of this name write ./{name})" if Path(name).is_dir() else ""
        raise InputError(
            f"no data set is called {name}, here or in TFDS{folder}; check the name, {_OTHER_WAYS}"
        ) from error
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"data set {name} cannot be read through TFDS ({one_line(error)}); {advice}"
        ) from error
    return builder


def _read_split(
    builder: Any, name: str, split: str, image_size: int | None
) -> tuple[np.ndarray, np.ndarray]:
    features = sorted(builder.info.features)
    if "image" not in features or "label" not in features:
        raise InputError(
            f"TFDS data set {name} has the features {', '.join(features)}; "
            "needed are image and label"
        )
    source = builder.as_data_source(split)
    labels = np.empty(len(source), np.int64)

    def images() -> Iterable[np.ndarray]:
        shape = None
        for index in range(len(source)):
            try:
                example = source[index]
                labels[index] = example["label"]
            except Exception as error:  # of the record reader and of the image decoder
                raise InputError(
                    f"cannot read {name} {split}[{index}]: {one_line(error)}; prepare it again"
                ) from error
            image = np.asarray(example["image"])
            if image.ndim == 2:
                image = image[..., None]
            check_pixels(f"{name} {split}[{index}]", *image.shape[:2], image_size)
            if image_size is not None:
                image = resize(image, image_size)
            shape = shape or image.shape
            if image.shape != shape:
                raise unequal(f"{split}[0]", shape, f"{split}[{index}]", image.shape)
            yield image

    return stack(images(), len(source)), labels


def _import_tfds() -> Any:
    try:
        import array_record  # noqa: F401  (TFDS reports its absence only deep inside)
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            f"TFDS data sets need the package {error.name}: "
            "pip install tensorflow-datasets array-record importlib-resources"
        ) from error
    return tfds
