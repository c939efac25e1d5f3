"""Images of one class with a few of another kind among them, for generative models."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from tda_lightning.examples.data.base import DataModule, choose
from tda_lightning.examples.data.images import CIFAR10Data, ImageData, MNISTData, Split
from tda_lightning.records.rendered import Rendered


class OutlierImages(DataModule):
    """One class of CIFAR-10 with MNIST digits among them (Xie et al. 2024, 2401.09031, sec. 6.1).

    Images are [3, size, size] in -1 .. 1: digits are padded to 32 x 32 and repeated in the three
    channels, and both are averaged over squares of pixels. The outliers come last in the training
    set. Queries are held-out images, as many of the class as digits, the digits last.

    Args:
        root: folder with ``cifar10`` and ``mnist``.
        file: of CIFAR-10 (:class:`~tda_lightning.examples.data.CIFAR10Data`).
        category: name of a class of CIFAR-10.
        digit: of MNIST.
        num_outliers: digits in the training set.
        size: height and width, 32 or a part of it.
        batch_size: examples in a training batch.
        num_train: images of the class in the training set; None keeps all.
        num_query: queries; None for all held-out images of the class.
        subset_seed: for choosing images.
        seed: of the order in which training examples are drawn.
        num_workers: processes that load batches.

    Attributes:
        num_inliers: images of the class in the training set, once it is loaded: the index of the
            first outlier.
    """

    def __init__(
        self,
        root: str = "data",
        file: str = "cifar10_lossless_4000train_1000test.npz",
        category: str = "airplane",
        digit: int = 0,
        num_outliers: int = 200,
        size: int = 16,
        batch_size: int = 32,
        num_train: int | None = None,
        num_query: int | None = 40,
        subset_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        if category not in CIFAR10Data.classes:
            raise ValueError(
                f"category must be one of {', '.join(CIFAR10Data.classes)}, got {category!r}."
            )
        if not 0 <= digit <= 9:
            raise ValueError(f"digit must be in 0 to 9, got {digit}.")
        if size < 1 or 32 % size:
            raise ValueError(f"size must divide 32, got {size}.")
        if num_query is not None and num_query % 2:
            raise ValueError(f"num_query must be even, half of them digits, got {num_query}.")
        self.root, self.file = root, file
        self.category, self.digit, self.num_outliers = category, digit, num_outliers
        self.size, self.num_train, self.num_query = size, num_train, num_query
        self.subset_seed = subset_seed
        self.num_inliers = 0

    def load(self) -> tuple[Dataset, Dataset]:
        options: dict[str, Any] = {"root": self.root}
        inliers = _of_class(
            CIFAR10Data(file=self.file, **options), CIFAR10Data.classes.index(self.category)
        )
        outliers = _of_class(MNISTData(**options), self.digit)
        seed, half = self.subset_seed, None if self.num_query is None else self.num_query // 2
        kept = inliers[0][choose(len(inliers[0]), self.num_train, seed, "num_train")]
        digits = outliers[0][choose(len(outliers[0]), self.num_outliers, seed, "num_outliers")]
        queries = inliers[1][choose(len(inliers[1]), half, seed, "num_query")]
        chosen = choose(len(outliers[1]), len(queries), seed, "num_query")
        self.num_inliers = len(kept)
        train = torch.cat([self._scaled(kept), self._scaled(digits)])
        query = torch.cat([self._scaled(queries), self._scaled(outliers[1][chosen])])
        return TensorDataset(train), TensorDataset(query)

    def is_outlier(self, split: str) -> Tensor:
        """Which examples of a split are digits, bool [example]."""
        count = len(self.dataset(split))  # type: ignore[arg-type]
        first = self.num_inliers if split == "train" else count // 2
        return torch.arange(count) >= first

    def render(self, split: str, index: int) -> Rendered:
        (image,) = self.dataset(split)[index]
        outlier = bool(self.is_outlier(split)[index])
        caption = f"MNIST {self.digit}" if outlier else f"CIFAR-10 {self.category}"
        return Rendered(caption=caption, image=as_pixels(image))

    def _scaled(self, images: Tensor) -> Tensor:
        """Raw images [example, height, width(, channel)] in -1 .. 1, [example, 3, size, size]."""
        pixels = images.float() / 127.5 - 1
        if pixels.dim() == 3:
            pixels = F.pad(pixels, (2, 2, 2, 2), value=-1.0)[:, None].expand(-1, 3, -1, -1)
        else:
            pixels = pixels.permute(0, 3, 1, 2)
        return F.avg_pool2d(pixels, 32 // self.size)


def as_pixels(image: Tensor) -> Tensor:
    """An image [channel, height, width] in -1 .. 1 as bytes, [height, width, channel]."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)


def _of_class(data: ImageData, label: int) -> tuple[Tensor, Tensor]:
    """Raw training images and queries of one class."""

    def chosen(split: Split) -> Tensor:
        return torch.from_numpy(split.images[split.labels == label])

    train, query = data.read()
    return chosen(train), chosen(query)
