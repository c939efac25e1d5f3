"""Networks for pictures and tables, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
}


def make_activation(name: str) -> nn.Module:
    """The activation called ``name``."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}.")
    return ACTIVATIONS[name]()


class MLP(nn.Sequential):
    """Linear layers with an activation between them; inputs are flattened.

    Args:
        inputs: numbers per example.
        widths: of the hidden layers.
        outputs: classes, or numbers to predict.
        activation: "relu", "gelu", "tanh" or "silu".
        dropout: after each hidden layer.
    """

    def __init__(
        self,
        inputs: int,
        widths: Sequence[int],
        outputs: int,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        sizes = [inputs, *widths]
        for before, after in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(before, after), make_activation(activation)]
            if dropout:
                layers.append(nn.Dropout(dropout))
        super().__init__(*layers, nn.Linear(sizes[-1], outputs))


class CNN(nn.Sequential):
    """3 x 3 convolutions that each halve the picture by pooling, then one or two linear layers.

    Args:
        channels: of the picture.
        size: height and width of the picture.
        widths: channels after each convolution.
        hidden: width of a linear layer before the last, 0 for none.
        outputs: classes.
        activation: "relu", "gelu", "tanh" or "silu".
        dropout: before the last layer.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        widths: Sequence[int],
        outputs: int,
        hidden: int = 0,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        layers: list[nn.Module] = []
        for before, after in zip([channels, *widths], widths, strict=False):
            layers += [
                nn.Conv2d(before, after, kernel_size=3, padding=1),
                make_activation(activation),
                nn.MaxPool2d(2),
            ]
            size //= 2
        if size < 1:
            raise ValueError(
                f"{len(widths)} convolutions halve the picture to nothing. Give fewer widths."
            )
        layers.append(nn.Flatten())
        features = widths[-1] * size * size
        if hidden:
            layers += [nn.Linear(features, hidden), make_activation(activation)]
            features = hidden
        if dropout:
            layers.append(nn.Dropout(dropout))
        super().__init__(*layers, nn.Linear(features, outputs))


class ResNet9(nn.Module):
    """The small residual network of fast CIFAR-10 training (Page, 2018), for 32 x 32 pictures.

    BatchNorm statistics are frozen during attribution, so every example has a gradient of its own.

    Args:
        channels: of the picture.
        outputs: classes.
        width: channels of the first convolution; the published network has 64.
    """

    def __init__(self, channels: int = 3, outputs: int = 10, width: int = 64) -> None:
        super().__init__()
        self.stem = _convolution(channels, width)
        self.down1 = nn.Sequential(_convolution(width, 2 * width), nn.MaxPool2d(2))
        self.residual1 = nn.Sequential(
            _convolution(2 * width, 2 * width), _convolution(2 * width, 2 * width)
        )
        self.down2 = nn.Sequential(_convolution(2 * width, 4 * width), nn.MaxPool2d(2))
        self.down3 = nn.Sequential(_convolution(4 * width, 4 * width), nn.MaxPool2d(2))
        self.residual2 = nn.Sequential(
            _convolution(4 * width, 4 * width), _convolution(4 * width, 4 * width)
        )
        self.head = nn.Sequential(
            nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4 * width, outputs)
        )

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.down1(self.stem(images))
        hidden = hidden + self.residual1(hidden)
        hidden = self.down3(self.down2(hidden))
        return self.head(hidden + self.residual2(hidden))


def _convolution(before: int, after: int) -> nn.Module:
    # BatchNorm subtracts the mean, so a bias of the convolution would do nothing.
    return nn.Sequential(
        nn.Conv2d(before, after, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    )
