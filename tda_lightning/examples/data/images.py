"""Image classification: digits, MNIST, FashionMNIST, CIFAR-10."""

from __future__ import annotations

import gzip
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from tda_lightning.examples.data.base import DataModule, choose, find_files, predicted_classes
from tda_lightning.records.rendered import Rendered


class Split(NamedTuple):
    """Raw images, uint8 [example, height, width(, channel)], and labels, int64 [example]."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


class ImageData(DataModule):
    """Images scaled to mean 0 and standard deviation 1 over the training set, channels first.

    A pool for a recorded run is scaled by the recorded training set (:meth:`scaled_as`).

    Args:
        batch_size: examples in a training batch.
        num_train: training examples to keep, drawn with ``subset_seed``; None keeps all.
        num_query: queries to keep, likewise.
        subset_seed: seed of both draws.
        flip_fraction: share of the training labels to replace by another class.
        flip_seed: for choosing the labels and their replacements.
        seed: of the order in which training examples are drawn.
        num_workers: processes that load batches.

    Attributes:
        flipped: indices of the training examples with a replaced label, int64, increasing.
        clean_labels: the training labels before any was replaced, int64 [train].
    """

    classes: Sequence[str]

    def __init__(
        self,
        batch_size: int = 64,
        num_train: int | None = None,
        num_query: int | None = None,
        subset_seed: int = 0,
        flip_fraction: float = 0.0,
        flip_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        if not 0 <= flip_fraction < 1:
            raise ValueError(f"flip_fraction must be in [0, 1), got {flip_fraction}.")
        self.num_train = num_train
        self.num_query = num_query
        self.subset_seed = subset_seed
        self.flip_fraction = flip_fraction
        self.flip_seed = flip_seed
        self.flipped = torch.empty(0, dtype=torch.int64)
        self.clean_labels = torch.empty(0, dtype=torch.int64)
        self._pictures: dict[str, Tensor] = {}
        self._moments: tuple[Tensor, Tensor] | None = None  # what examples are scaled by

    def scaled_as(self, recorded: ImageData) -> None:
        """Scale as ``recorded`` does, by the moments of its training set."""
        recorded.setup()
        self._moments = recorded._moments

    @abstractmethod
    def read(self) -> tuple[Split, Split]:
        """All raw training images and all raw queries."""

    def load(self) -> tuple[Dataset, Dataset]:
        train, query = self.read()
        train = _subset(train, self.num_train, self.subset_seed, "num_train")
        query = _subset(query, self.num_query, self.subset_seed, "num_query")

        self.clean_labels = torch.from_numpy(train.labels)
        labels = self.clean_labels.clone()
        self.flipped = flip_labels(
            labels, len(self.classes), self.flip_fraction, seed=self.flip_seed
        )
        self._pictures = {
            "train": torch.from_numpy(train.images),
            "query": torch.from_numpy(query.images),
        }
        pixels = _channels_first(train.images)
        if self._moments is None:
            self._moments = _moments(train.images)
        mean, std = self._moments
        return (
            TensorDataset((pixels - mean) / std, labels),
            TensorDataset(
                (_channels_first(query.images) - mean) / std, torch.from_numpy(query.labels)
            ),
        )

    def describe(self, outputs: Tensor) -> list[str]:
        """The likeliest class of each query and its probability."""
        return predicted_classes(outputs, self.classes)

    def group_columns(self, split: str) -> dict[str, list[str]]:
        """The class of each example, and of training examples whether it was replaced."""
        _, labels = self.dataset(split)[:]
        columns = {"class": [self.classes[label] for label in labels.tolist()]}
        if split == "train" and len(self.flipped):
            flipped = set(self.flipped.tolist())
            columns["flipped"] = ["yes" if n in flipped else "no" for n in range(len(labels))]
        return columns

    def render(self, split: str, index: int) -> Rendered:
        _, label = self.dataset(split)[index]
        caption = self.classes[int(label)]
        if split == "train" and index in self.flipped.tolist():
            caption += f" (label flipped, was {self.classes[int(self.clean_labels[index])]})"
        return Rendered(caption=caption, image=self._pictures[split][index])


class DigitsData(ImageData):
    """The 1797 handwritten digits that ship with scikit-learn, 8 x 8 pixels; no file is needed.

    The last ``holdout`` of them in a seeded order are the queries.
    """

    classes = tuple("0123456789")

    def __init__(self, holdout: int = 297, **options: Any) -> None:
        super().__init__(**options)
        self.holdout = holdout

    def read(self) -> tuple[Split, Split]:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(
                "The digits data set comes with scikit-learn, which is not installed. "
                "Run: pip install 'tda-lightning[demo]'"
            ) from error
        raw = load_digits()
        images = (raw.images / 16 * 255).round().astype(np.uint8)
        labels = raw.target.astype(np.int64)
        order = np.random.default_rng(self.subset_seed).permutation(len(labels))
        train, query = order[: -self.holdout], order[-self.holdout :]
        return Split(images[train], labels[train]), Split(images[query], labels[query])


class IdxData(ImageData):
    """Four gzip-compressed idx files, the format of MNIST and its descendants."""

    folder: str
    source: str

    def __init__(self, root: str = "data", **options: Any) -> None:
        super().__init__(**options)
        self.root = root

    def read(self) -> tuple[Split, Split]:
        names = [
            f"{part}-{kind}-ubyte.gz"
            for part in ("train", "t10k")
            for kind in ("images-idx3", "labels-idx1")
        ]
        arrays = [read_idx(path) for path in find_files(self.root, self.folder, names, self.source)]
        train = Split(arrays[0], arrays[1].astype(np.int64))
        return train, Split(arrays[2], arrays[3].astype(np.int64))


class MNISTData(IdxData):
    """MNIST: 60000 handwritten digits and 10000 queries, 28 x 28 pixels."""

    folder = "mnist"
    source = "They are the files of MNIST as Yann LeCun published them, under their own names."
    classes = tuple("0123456789")


class FashionMNISTData(IdxData):
    """FashionMNIST: 60000 images of clothing and 10000 queries, 28 x 28 pixels."""

    folder = "fashion_mnist"
    source = "Get them from https://github.com/zalandoresearch/fashion-mnist (data/fashion)."
    classes = (
        "T-shirt",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    )


class CIFAR10Data(ImageData):
    """CIFAR-10 in one npz file with x_train, y_train, x_test and y_test.

    Images are uint8 [example, 32, 32, 3], labels integers. The default file holds the first 4000
    training and 1000 test images in the official order; ``file`` names another, larger one.
    """

    classes = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )

    def __init__(
        self,
        root: str = "data",
        file: str = "cifar10_lossless_4000train_1000test.npz",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.root = root
        self.file = file

    def read(self) -> tuple[Split, Split]:
        source = (
            "Make it from https://www.cs.toronto.edu/~kriz/cifar.html: an npz file of uint8 arrays "
            "x_train and x_test [example, 32, 32, 3] with integer labels y_train and y_test."
        )
        (path,) = find_files(self.root, "cifar10", [self.file], source)
        with np.load(path, allow_pickle=False) as arrays:
            missing = {"x_train", "y_train", "x_test", "y_test"} - set(arrays.files)
            if missing:
                raise ValueError(f"{path} has no array {', '.join(sorted(missing))}. {source}")
            return (
                Split(arrays["x_train"], arrays["y_train"].astype(np.int64)),
                Split(arrays["x_test"], arrays["y_test"].astype(np.int64)),
            )


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of bytes in a gzip-compressed idx file.

    The header is two zero bytes, the type (8: unsigned byte), the number of axes, and the length of
    each as a big-endian 32-bit integer.

    Raises:
        ValueError: not an idx file of bytes, or cut short.
    """
    with gzip.open(path, "rb") as file:
        content = file.read()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an idx file of unsigned bytes: it starts {content[:4]!r}.")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content, dtype=">u4", count=content[3], offset=4)
    values = np.frombuffer(content, dtype=np.uint8, offset=start)
    if values.size != np.prod(shape):
        raise ValueError(
            f"{path} is cut short: its header promises {int(np.prod(shape))} bytes, "
            f"it holds {values.size}. Get it again."
        )
    return values.reshape(shape).copy()


def flip_labels(labels: Tensor, num_classes: int, fraction: float, seed: int) -> Tensor:
    """Replace a random part of ``labels`` in place, each by a different class chosen evenly.

    Returns:
        Indices of the replaced labels, increasing; round(fraction x length) of them.

    Example:
        >>> labels = torch.zeros(10, dtype=torch.int64)
        >>> flipped = flip_labels(labels, num_classes=3, fraction=0.2, seed=0)
        >>> len(flipped), bool((labels[flipped] > 0).all()), int((labels > 0).sum())
        (2, True, 2)
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    flipped = order[: round(fraction * len(labels))].sort().values
    shift = torch.randint(1, num_classes, (len(flipped),), generator=generator)
    labels[flipped] = (labels[flipped] + shift) % num_classes
    return flipped


def _subset(split: Split, size: int | None, seed: int, what: str) -> Split:
    kept = choose(len(split.labels), size, seed, what).numpy()
    return Split(split.images[kept], split.labels[kept])


def _channels_first(images: NDArray[np.uint8]) -> Tensor:
    pixels = torch.from_numpy(images).float() / 255
    return pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()


def _moments(images: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel in units of 255, [1, channel, 1, 1].

    Computed from sums of integers, which do not depend on the number of threads: the fingerprint
    of the data must be the same everywhere.
    """
    values = images.reshape(-1, images.shape[3] if images.ndim == 4 else 1)
    levels = np.stack([np.bincount(channel, minlength=256) for channel in values.T])
    level, count = np.arange(256, dtype=np.int64), len(values)
    mean = levels @ level / count
    variance = (levels @ level**2 - count * mean**2) / (count - 1)
    moments = torch.from_numpy(np.stack([mean, np.sqrt(variance)]) / 255).float()
    return moments[0].view(1, -1, 1, 1), moments[1].view(1, -1, 1, 1)
