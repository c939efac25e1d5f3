"""Data modules of the examples: a training set and queries, and how to show one example."""

from tda_lightning.examples.data.base import DataModule
from tda_lightning.examples.data.images import CIFAR10Data, DigitsData, FashionMNISTData, MNISTData
from tda_lightning.examples.data.outliers import OutlierImages
from tda_lightning.examples.data.pairs import MNLIData
from tda_lightning.examples.data.tabular import ConcreteData
from tda_lightning.examples.data.text import WikiText2Data

__all__ = [
    "CIFAR10Data",
    "ConcreteData",
    "DataModule",
    "DigitsData",
    "FashionMNISTData",
    "MNISTData",
    "MNLIData",
    "OutlierImages",
    "WikiText2Data",
]
