"""One layer at a time, between others where it needs a nonlinearity behind it."""

from __future__ import annotations

from torch import nn

from tests.cases.case import Case, frozen, normal, tokens


def chain(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


def _convolution(name: str, build, inputs, size: int = 3) -> Case:
    """The convolution, a nonlinearity and a second, small one."""
    return Case(f"conv/{name}", lambda: chain(build(), nn.Tanh()), inputs, size=size)


LINEAR = [
    Case("mlp/regression", lambda: chain(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), normal(4)),
    Case(
        "mlp/classification",
        lambda: chain(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
        normal(4),
        "classification",
        size=5,
    ),
    Case("linear/plain", lambda: nn.Linear(4, 3), normal(4)),
    Case("linear/one_to_one", lambda: chain(nn.Linear(1, 1), nn.Tanh()), normal(1)),
    Case("linear/no_bias", lambda: chain(nn.Linear(4, 3, bias=False), nn.Tanh()), normal(4)),
    Case(
        "linear/leading_axes",
        lambda: chain(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)),
        normal(2, 3, 4),
    ),
    Case(
        "linear/positions_classification",
        lambda: chain(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        normal(6, 4),
        "classification",
    ),
    Case(
        "linear/many_positions_few_features",
        lambda: chain(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)),
        normal(12, 2),
    ),
    Case(
        "linear/flattened",
        lambda: chain(nn.Linear(3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)),
        normal(4, 3),
    ),
    Case(
        "linear/bias_frozen",
        lambda: frozen(chain(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), "0.bias"),
        normal(4),
    ),
    Case(
        "linear/weight_frozen",
        lambda: frozen(chain(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), "0.weight", "2.weight"),
        normal(2, 4),
    ),
]

CONVOLUTION = [
    _convolution("1d", lambda: nn.Conv1d(2, 3, 3), normal(2, 6)),
    _convolution("1d_stride_same_as_kernel", lambda: nn.Conv1d(2, 3, 2, stride=2), normal(2, 7)),
    _convolution(
        "1d_causal_dilated",
        lambda: nn.Conv1d(2, 4, 3, padding=4, dilation=2, groups=2),
        normal(2, 6),
    ),
    _convolution("1d_kernel_one", lambda: nn.Conv1d(3, 2, 1), normal(3, 5)),
    _convolution("2d", lambda: nn.Conv2d(2, 3, 3), normal(2, 5, 4)),
    _convolution("2d_no_bias", lambda: nn.Conv2d(2, 3, 3, bias=False), normal(2, 5, 4)),
    _convolution("2d_stride", lambda: nn.Conv2d(2, 3, 3, stride=2), normal(2, 6, 7)),
    _convolution(
        "2d_uneven",
        lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        normal(2, 6, 5),
    ),
    _convolution("2d_groups", lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), normal(4, 4, 4)),
    _convolution("2d_depthwise", lambda: nn.Conv2d(3, 3, 3, groups=3, padding=1), normal(3, 4, 4)),
    _convolution(
        "2d_depthwise_multiplier", lambda: nn.Conv2d(3, 6, 3, groups=3, stride=2), normal(3, 5, 5)
    ),
    _convolution("2d_whole_image", lambda: nn.Conv2d(2, 3, (4, 5)), normal(2, 4, 5)),
    _convolution("2d_valid", lambda: nn.Conv2d(2, 3, 2, padding="valid"), normal(2, 4, 4)),
    _convolution("2d_same", lambda: nn.Conv2d(2, 3, 3, padding="same"), normal(2, 4, 5)),
    _convolution(
        "2d_same_even_dilated",
        lambda: nn.Conv2d(2, 3, (2, 4), padding="same", dilation=(1, 3)),
        normal(2, 5, 6),
    ),
    _convolution(
        "2d_same_even_reflect",
        lambda: nn.Conv2d(2, 3, (2, 4), padding="same", padding_mode="reflect"),
        normal(2, 5, 6),
    ),
    _convolution("3d", lambda: nn.Conv3d(1, 2, 2), normal(1, 3, 3, 4)),
    _convolution(
        "3d_all",
        lambda: nn.Conv3d(2, 4, (2, 1, 3), (2, 1, 1), (1, 0, 1), (1, 1, 2), groups=2),
        normal(2, 4, 3, 4),
    ),
    *(
        _convolution(
            f"{axes}d_{mode}",
            lambda build=build, mode=mode: build(2, 3, 3, padding=2, stride=2, padding_mode=mode),
            normal(2, *([4] * axes)),
        )
        for axes, build in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d))
        for mode in ("zeros", "reflect", "replicate", "circular")
    ),
    Case(
        "conv/network",
        lambda: chain(
            nn.Conv2d(1, 2, 3, padding=1),
            nn.BatchNorm2d(2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(2, 3, 3, stride=2, padding=1, groups=1),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(3, 4),
        ),
        normal(1, 6, 6),
        "classification",
    ),
    Case(
        "conv/bias_frozen",
        lambda: frozen(chain(nn.Conv2d(2, 3, 3), nn.Tanh()), "0.bias"),
        normal(2, 4, 4),
    ),
    Case(
        "conv/weight_frozen",
        lambda: frozen(chain(nn.Conv2d(2, 3, 3), nn.Tanh()), "0.weight"),
        normal(2, 4, 4),
    ),
    Case(
        "conv/transposed",
        lambda: chain(
            nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2), nn.Tanh()
        ),
        normal(2, 3, 3),
    ),
    Case(
        "conv/transposed_1d",
        lambda: chain(nn.ConvTranspose1d(2, 3, 3, stride=2, dilation=2), nn.Tanh()),
        normal(2, 4),
    ),
]

EMBEDDING = [
    Case("embedding/plain", lambda: chain(nn.Embedding(7, 3), nn.Tanh()), tokens(7, 5)),
    Case("embedding/one_token", lambda: chain(nn.Embedding(7, 3), nn.Tanh()), tokens(7)),
    Case("embedding/grid", lambda: chain(nn.Embedding(5, 3), nn.Tanh()), tokens(5, 2, 3)),
    Case(
        "embedding/padding_index",
        lambda: chain(nn.Embedding(5, 3, padding_idx=2), nn.Linear(3, 4)),
        tokens(5, 6),
        "classification",
    ),
    Case(
        "embedding/negative_padding_index",
        lambda: chain(nn.Embedding(5, 3, padding_idx=-1), nn.Linear(3, 4)),
        tokens(5, 6),
        "classification",
    ),
    Case(
        "embedding/wide_vocabulary",
        lambda: chain(nn.Embedding(50, 2), nn.Flatten(), nn.Linear(8, 3)),
        tokens(50, 4),
        "classification",
    ),
    Case(
        "embedding/bag",
        lambda: chain(nn.EmbeddingBag(7, 3, mode="mean"), nn.Linear(3, 2)),
        tokens(7, 4),
        may_refuse=True,
    ),
]

NORMALISATION = [
    Case("norm/layer", lambda: chain(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh()), normal(4)),
    Case("norm/layer_positions", lambda: chain(nn.LayerNorm(4), nn.Linear(4, 2)), normal(3, 4)),
    Case("norm/layer_two_axes", lambda: chain(nn.LayerNorm([2, 3]), nn.Tanh()), normal(5, 2, 3)),
    Case(
        "norm/layer_no_bias",
        lambda: chain(nn.LayerNorm(4, bias=False, eps=0.1), nn.Tanh()),
        normal(3, 4),
    ),
    Case(
        "norm/layer_plain",
        lambda: chain(nn.Linear(3, 4), nn.LayerNorm(4, elementwise_affine=False), nn.Tanh()),
        normal(2, 3),
    ),
    Case(
        "norm/layer_weight_frozen",
        lambda: frozen(chain(nn.LayerNorm(4), nn.Tanh()), "0.weight"),
        normal(3, 4),
    ),
    Case("norm/group", lambda: chain(nn.GroupNorm(2, 4), nn.Tanh()), normal(4, 3, 3)),
    Case("norm/group_one", lambda: chain(nn.GroupNorm(1, 4, eps=0.1), nn.Tanh()), normal(4, 5)),
    Case("norm/group_no_positions", lambda: chain(nn.GroupNorm(2, 4), nn.Tanh()), normal(4)),
    Case("norm/rms", lambda: chain(nn.RMSNorm(4), nn.Tanh()), normal(3, 4)),
    Case("norm/rms_two_axes", lambda: chain(nn.RMSNorm([2, 3], eps=0.1), nn.Tanh()), normal(2, 3)),
    Case("norm/batch_1d", lambda: chain(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()), normal(3)),
    Case("norm/batch_1d_positions", lambda: chain(nn.BatchNorm1d(4), nn.Tanh()), normal(4, 5)),
    Case("norm/batch_2d", lambda: chain(nn.BatchNorm2d(3, eps=0.1), nn.Tanh()), normal(3, 4, 4)),
    Case("norm/batch_3d", lambda: chain(nn.BatchNorm3d(2), nn.Tanh()), normal(2, 2, 3, 2)),
    Case(
        "norm/instance",
        lambda: chain(nn.InstanceNorm2d(3, affine=True), nn.Tanh()),
        normal(3, 4, 4),
    ),
]

OTHER = [
    Case("other/prelu", lambda: chain(nn.Linear(3, 4), nn.PReLU(4)), normal(3)),
    Case("other/prelu_one", lambda: chain(nn.Conv1d(2, 3, 2), nn.PReLU()), normal(2, 4)),
]

LAYERS = [*LINEAR, *CONVOLUTION, *EMBEDDING, *NORMALISATION, *OTHER]
