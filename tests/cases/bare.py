"""Parameters that no layer holds: added, multiplied, indexed, or handed to a function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.cases.case import Case, Function, frozen, normal, parameter, tokens

BARE = [
    Case(
        "bare/positions",
        lambda: Function(
            lambda m, x: m.head((m.embed(x) + m.positions).tanh()),
            embed=nn.Linear(3, 4),
            positions=parameter(1, 5, 4),
            head=nn.Linear(4, 2),
        ),
        normal(5, 3),
    ),
    Case(
        "bare/positions_sliced",
        lambda: Function(
            lambda m, x: (m.embed(x) + m.positions[: x.shape[1]]).tanh(),
            embed=nn.Embedding(6, 4),
            positions=parameter(7, 4),
        ),
        tokens(6, 4),
    ),
    Case(
        "bare/class_token",
        lambda: Function(
            lambda m, x: m.mix(
                torch.cat([m.token.expand(len(x), -1, -1), x], 1).transpose(1, 2)
            ).tanh(),
            token=parameter(1, 1, 3),
            mix=nn.Linear(5, 2),
        ),
        normal(4, 3),
    ),
    Case(
        "bare/scale",
        lambda: Function(lambda m, x: (m.scale * x).tanh(), scale=parameter(3)),
        normal(4, 3),
    ),
    Case(
        "bare/keywords",
        lambda: Function(
            lambda m, x: torch.mul(input=torch.add(input=x, other=m.shift), other=m.scale).tanh(),
            scale=parameter(3),
            shift=parameter(3),
        ),
        normal(4, 3),
    ),
    Case(
        "bare/scalar",
        lambda: Function(
            lambda m, x: m.layer(x * m.scale.exp()).tanh(), scale=parameter(), layer=nn.Linear(3, 2)
        ),
        normal(3),
    ),
    Case(
        "bare/temperature",
        lambda: Function(
            lambda m, x: m.layer(x) / F.softplus(m.scale), scale=parameter(1), layer=nn.Linear(3, 4)
        ),
        normal(3),
        "classification",
    ),
    Case(
        "bare/product",
        lambda: Function(
            lambda m, x: (x @ m.weight + m.bias).tanh(), weight=parameter(3, 2), bias=parameter(2)
        ),
        normal(3),
    ),
    Case(
        "bare/product_positions",
        lambda: Function(lambda m, x: (x @ m.weight).tanh(), weight=parameter(3, 2)),
        normal(4, 3),
    ),
    Case(
        "bare/product_from_left",
        lambda: Function(lambda m, x: (m.weight @ x).tanh(), weight=parameter(2, 3)),
        normal(3, 4),
    ),
    Case(
        "bare/addmm",
        lambda: Function(
            lambda m, x: torch.addmm(m.bias, x, m.weight.t()).tanh(),
            weight=parameter(2, 3),
            bias=parameter(2),
        ),
        normal(3),
    ),
    Case(
        "bare/transposed",  # of Falcon
        lambda: Function(
            lambda m, x: (x @ m.weight.T + m.bias).tanh() @ m.other.mT,
            weight=parameter(4, 3),
            bias=parameter(4),
            other=parameter(2, 4),
        ),
        normal(5, 3),
    ),
    Case(
        "bare/stored_transposed",
        lambda: Function(
            lambda m, x: F.linear(
                F.linear(x, m.weight.transpose(0, 1), m.bias).tanh(), m.other.t()
            ),
            weight=parameter(3, 4),
            bias=parameter(4),
            other=parameter(4, 2),
        ),
        normal(5, 3),
    ),
    Case(
        "bare/one_and_scale",  # of Gemma's norms
        lambda: Function(
            lambda m, x: (
                m.head(F.normalize(x, dim=-1) * (1.0 + m.scale.double())).tanh() * (m.factor + 2)
            ),
            scale=parameter(3),
            head=nn.Linear(3, 2),
            factor=parameter(2),
        ),
        normal(5, 3),
    ),
    Case(
        "bare/one_and_scale_elsewhere",
        lambda: Function(
            lambda m, x: m.head(x * (1.0 + m.scale)).tanh() + (1.0 + m.scale).square().sum(),
            scale=parameter(3),
            head=nn.Linear(3, 2),
        ),
        normal(5, 3),
    ),
    Case(
        "bare/conv1d",  # of GPT-2
        lambda: Function(
            lambda m, x: m.head(
                torch.addmm(m.bias, x.reshape(-1, 3), m.weight).view(*x.shape[:-1], 4).tanh()
            ),
            weight=parameter(3, 4),
            bias=parameter(4),
            head=nn.Linear(4, 2),
        ),
        normal(5, 3),
    ),
    Case(
        "bare/product_both_ways",
        lambda: Function(
            lambda m, x: F.linear((x @ m.weight).tanh(), m.weight), weight=parameter(3, 3)
        ),
        normal(4, 3),
    ),
    Case(
        "bare/batched_product",
        lambda: Function(
            lambda m, x: torch.bmm(x, m.weight.expand(len(x), -1, -1)).tanh(),
            weight=parameter(3, 2),
        ),
        normal(4, 3),
    ),
    Case(
        "bare/product_over_heads",
        lambda: Function(lambda m, x: (x[:, None] @ m.weight).tanh(), weight=parameter(2, 3, 2)),
        normal(4, 3),
    ),
    Case(
        "bare/einsum",
        lambda: Function(
            lambda m, x: torch.einsum("btd,hde->bhte", x, m.weight).tanh(),
            weight=parameter(2, 3, 2),
        ),
        normal(4, 3),
    ),
    Case(
        "bare/functional_linear",
        lambda: Function(
            lambda m, x: F.linear(x, m.weight, m.bias).tanh(),
            weight=parameter(2, 3),
            bias=parameter(2),
        ),
        normal(4, 3),
    ),
    Case(
        "bare/functional_convolution",
        lambda: Function(
            lambda m, x: F.conv2d(x, m.weight, m.bias, padding=1).tanh(),
            weight=parameter(3, 2, 3, 3),
            bias=parameter(3),
        ),
        normal(2, 4, 4),
    ),
    Case(
        "bare/functional_embedding",
        lambda: Function(lambda m, x: F.embedding(x, m.table).tanh(), table=parameter(6, 3)),
        tokens(6, 4),
    ),
    Case(
        "bare/indexed",
        lambda: Function(lambda m, x: m.table[x].tanh(), table=parameter(6, 3)),
        tokens(6, 4),
    ),
    Case(
        "bare/functional_norm",
        lambda: Function(
            lambda m, x: F.layer_norm(x, (3,), m.weight, m.bias).tanh(),
            weight=parameter(3),
            bias=parameter(3),
        ),
        normal(4, 3),
    ),
    Case(
        "bare/rms_by_hand",
        lambda: Function(
            lambda m, x: m.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)),
            weight=parameter(3),
        ),
        normal(4, 3),
    ),
    Case(
        "bare/prompt_only",
        lambda: Function(
            lambda m, x: m.layer(torch.cat([m.prompt.expand(len(x), -1, -1), x], 1).tanh()),
            prompt=parameter(2, 3),
            layer=frozen(nn.Linear(3, 2)),
        ),
        normal(4, 3),
    ),
    Case(
        "bare/in_a_list",
        lambda: Function(
            lambda m, x: sum((x * w).tanh() for w in m.scales),
            scales=nn.ParameterList([parameter(3), parameter(1), parameter(4, 3)]),
        ),
        normal(4, 3),
    ),
]
