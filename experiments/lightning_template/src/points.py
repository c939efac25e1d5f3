"""Data in the manner of the template: prepared and set up by Lightning."""

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset


class PointsDataModule(LightningDataModule):
    """Points above and below a curve, the first ten with a wrong label."""

    def __init__(self, batch_size: int, num_train: int) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(0)
        points = torch.randn(self.hparams.num_train + 50, 2, generator=generator)
        labels = (points[:, 1] > points[:, 0].sin()).long()
        labels[:10] = 1 - labels[:10]
        self.train = TensorDataset(points[:-50], labels[:-50])
        self.val = TensorDataset(points[-50:], labels[-50:])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.hparams.batch_size)
