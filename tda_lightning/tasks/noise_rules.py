"""What torch's random functions draw, written as functions of uniform and normal numbers.

A rule has the function's own arguments and laws. ``RULES`` holds it by the function as a
``TorchFunctionMode`` sees it; :class:`Pass` says that the call draws nothing, or has no rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_ROUNDS = 24  # of a rejection that accepts at least 95 of 100: all fail once in 10^31


class Pass(Exception):
    """The call is to be made as it is."""


class Numbers(Protocol):
    """Where a rule's numbers come from; every call of one rule gives others."""

    def uniform(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """In (0, 1), float64."""

    def normal(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Of mean 0 and variance 1, float64."""

    def integers(self, shape: Sequence[int], high: int, device: torch.device) -> Tensor:
        """0 to high - 1, int64."""

    def permutation(self, count: int, device: torch.device) -> Tensor:
        """Of 0 to count - 1, int64."""


Rule = Callable[..., Any]
RULES: dict[Callable[..., Any], Rule] = {}


def _rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


def _shape(size: tuple[Any, ...], given: Any = None) -> list[int]:
    """The size from positional numbers, one sequence, or ``size=``."""
    if given is None:
        given = size[0] if len(size) == 1 and isinstance(size[0], Sequence) else size
    return [int(length) for length in given]


def _device(given: Any) -> torch.device:
    return torch.get_default_device() if given is None else torch.device(given)


def _made(
    values: Tensor, dtype: torch.dtype | None, out: Tensor | None, requires_grad: bool
) -> Tensor:
    values = values.to(torch.get_default_dtype() if dtype is None else dtype)
    if out is not None:
        return out.resize_(values.shape).copy_(values)
    return values.requires_grad_() if requires_grad else values


def _complex(draw: Callable[[], Tensor], dtype: torch.dtype | None, scale: float) -> Tensor:
    """Of a complex type both parts are drawn."""
    if dtype is None or not dtype.is_complex:
        return draw()
    return torch.complex(draw(), draw()) * scale


# New tensors.


@_rule(torch.rand)
def _rand(
    numbers: Numbers, *size: Any, dtype: Any = None, device: Any = None, out: Any = None,
    requires_grad: bool = False, **given: Any,
) -> Tensor:  # fmt: skip
    shape, place = _shape(size, given.get("size")), _device(device)
    values = _complex(lambda: numbers.uniform(shape, place), dtype, 1.0)
    return _made(values, dtype, out, requires_grad)


@_rule(torch.randn)
def _randn(
    numbers: Numbers, *size: Any, dtype: Any = None, device: Any = None, out: Any = None,
    requires_grad: bool = False, **given: Any,
) -> Tensor:  # fmt: skip
    shape, place = _shape(size, given.get("size")), _device(device)
    values = _complex(lambda: numbers.normal(shape, place), dtype, 0.5**0.5)
    return _made(values, dtype, out, requires_grad)


@_rule(torch.randint)
def _randint(
    numbers: Numbers, *args: Any, dtype: Any = None, device: Any = None, out: Any = None,
    requires_grad: bool = False, **given: Any,
) -> Tensor:  # fmt: skip
    bounds = [int(value) for value in args if not isinstance(value, Sequence)]
    sizes = [value for value in args if isinstance(value, Sequence)]
    low = int(given["low"]) if "low" in given else bounds.pop(0) if len(bounds) > 1 else 0
    high = int(given["high"]) if "high" in given else bounds.pop(0)
    shape = _shape((), given.get("size", sizes[0] if sizes else None))
    values = low + numbers.integers(shape, high - low, _device(device))
    return _made(values, torch.int64 if dtype is None else dtype, out, requires_grad)


@_rule(torch.randperm)
def _randperm(
    numbers: Numbers, n: int, dtype: Any = None, device: Any = None, out: Any = None,
    requires_grad: bool = False, **given: Any,
) -> Tensor:  # fmt: skip
    values = numbers.permutation(int(n), _device(device))
    return _made(values, torch.int64 if dtype is None else dtype, out, requires_grad)


@_rule(torch.rand_like)
def _rand_like(
    numbers: Numbers, input: Tensor, dtype: Any = None, device: Any = None, **given: Any
) -> Tensor:
    return _rand(
        numbers, list(input.shape), dtype=dtype or input.dtype, device=device or input.device,
        requires_grad=given.get("requires_grad", False),
    )  # fmt: skip


@_rule(torch.randn_like)
def _randn_like(
    numbers: Numbers, input: Tensor, dtype: Any = None, device: Any = None, **given: Any
) -> Tensor:
    return _randn(
        numbers, list(input.shape), dtype=dtype or input.dtype, device=device or input.device,
        requires_grad=given.get("requires_grad", False),
    )  # fmt: skip


@_rule(torch.randint_like)
def _randint_like(
    numbers: Numbers, input: Tensor, *bounds: int, dtype: Any = None, device: Any = None,
    **given: Any,
) -> Tensor:  # fmt: skip
    limits = {key: given[key] for key in ("low", "high") if key in given}
    return _randint(
        numbers, *bounds, size=list(input.shape), dtype=dtype or input.dtype,
        device=device or input.device, **limits,
    )  # fmt: skip


# Tensors of parameters. torch gives these parameters no gradient, or 0.


@_rule(torch.normal)
def _normal(
    numbers: Numbers, mean: Any = 0.0, std: Any = 1.0, size: Any = None, *, dtype: Any = None,
    device: Any = None, out: Any = None, requires_grad: bool = False, **given: Any,
) -> Tensor:  # fmt: skip
    tensors = [value.detach() for value in (mean, std) if isinstance(value, Tensor)]
    if not tensors:
        values = mean + std * numbers.normal(_shape((), size), _device(device))
        return _made(values, dtype, out, requires_grad)
    mean, std = (value.detach() if isinstance(value, Tensor) else value for value in (mean, std))
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    values = mean + std * numbers.normal(shape, tensors[0].device)
    return _made(values, dtype or tensors[0].dtype, out, requires_grad)


@_rule(torch.bernoulli, Tensor.bernoulli)
def _bernoulli(
    numbers: Numbers, input: Tensor, p: Any = None, *, generator: object = None, out: Any = None
) -> Tensor:
    chances = input.detach() if p is None else p
    values = numbers.uniform(input.shape, input.device) < chances
    return _made(values, input.dtype, out, requires_grad=False)


@_rule(torch.poisson)
def _poisson(numbers: Numbers, input: Tensor, generator: object = None) -> Tensor:
    """The smallest count whose probability not to be exceeded is at least a uniform number."""
    rate = input.detach().double()
    uniform = numbers.uniform(rate.shape, rate.device)
    low = torch.full_like(rate, -1.0)
    high = (rate + 40 * rate.sqrt() + 100).ceil()
    for _ in range(64):
        middle = ((low + high) / 2).floor()
        reached = torch.special.gammaincc(middle + 1, rate) >= uniform
        reached = (reached | (rate == 0)) & (middle >= 0)
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return high.to(input.dtype)


@_rule(torch.multinomial, Tensor.multinomial)
def _multinomial(
    numbers: Numbers, input: Tensor, num_samples: int, replacement: bool = False, *,
    generator: object = None, out: Any = None,
) -> Tensor:  # fmt: skip
    weights = input.detach().double()
    if replacement:
        shares = weights.cumsum(-1) / weights.sum(-1, keepdim=True)
        uniform = numbers.uniform((*weights.shape[:-1], num_samples), weights.device)
        chosen = (uniform.unsqueeze(-1) > shares.unsqueeze(-2)).sum(-1)
        chosen = chosen.clamp(max=weights.shape[-1] - 1)
    else:
        # The order of arrival at exponential times: the first is chosen in proportion to its rate.
        times = -numbers.uniform(weights.shape, weights.device).log() / weights
        chosen = times.argsort(-1)[..., :num_samples]
    return _made(chosen, torch.int64, out, requires_grad=False)


def gamma(numbers: Numbers, concentration: Tensor) -> Tensor:
    """Gamma variables of rate 1 in float64 (Marsaglia and Tsang, "A simple method for generating
    gamma variables", ACM TOMS 2000)."""
    shape, device = concentration.shape, concentration.device
    small = concentration < 1
    d = torch.where(small, concentration + 1, concentration) - 1 / 3
    found = torch.full_like(d, torch.nan)
    for _ in range(_ROUNDS):
        x = numbers.normal(shape, device)
        v = (1 + x / (9 * d).sqrt()) ** 3
        inside = v > 0
        logarithm = torch.where(inside, v, 1.0).log()
        accepted = inside & (
            numbers.uniform(shape, device).log() < x**2 / 2 + d - d * v + d * logarithm
        )
        found = torch.where(found.isnan() & accepted, d * v, found)
    boost = numbers.uniform(shape, device) ** (1 / torch.where(small, concentration, 1.0))
    return torch.where(small, found * boost, found)


@_rule(torch._standard_gamma)
def _standard_gamma(numbers: Numbers, input: Tensor, generator: object = None) -> Tensor:
    sample = gamma(numbers, input.detach().double()).to(input.dtype)
    if not input.requires_grad:
        return sample
    # The implicit derivative, as torch's own function has it.
    slope = torch._standard_gamma_grad(input.detach(), sample)
    return sample + (input - input.detach()) * slope


@_rule(torch._sample_dirichlet)
def _sample_dirichlet(numbers: Numbers, input: Tensor, generator: object = None) -> Tensor:
    parts = gamma(numbers, input.detach().double()).clamp(min=torch.finfo(torch.float64).tiny)
    return (parts / parts.sum(-1, keepdim=True)).to(input.dtype)


# In place.


def _fill(tensor: Tensor, values: Tensor) -> Tensor:
    return tensor.copy_(values.detach().to(tensor.dtype))


@_rule(Tensor.normal_, torch.nn.init.normal_)
def _normal_in_place(
    numbers: Numbers, tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: object = None
) -> Tensor:
    return _fill(tensor, mean + std * numbers.normal(tensor.shape, tensor.device))


@_rule(Tensor.uniform_)
def _uniform_in_place(numbers: Numbers, tensor: Tensor, *bounds: float, **given: Any) -> Tensor:
    low = given.get("from", bounds[0] if bounds else 0.0)
    high = given.get("to", bounds[1] if len(bounds) > 1 else 1.0)
    return _fill(tensor, low + (high - low) * numbers.uniform(tensor.shape, tensor.device))


@_rule(torch.nn.init.uniform_)
def _init_uniform(
    numbers: Numbers, tensor: Tensor, a: float = 0.0, b: float = 1.0, generator: object = None
) -> Tensor:
    return _uniform_in_place(numbers, tensor, a, b)


@_rule(Tensor.bernoulli_)
def _bernoulli_in_place(
    numbers: Numbers, tensor: Tensor, p: Any = 0.5, generator: object = None
) -> Tensor:
    return _fill(tensor, (numbers.uniform(tensor.shape, tensor.device) < p).double())


@_rule(Tensor.exponential_)
def _exponential_in_place(
    numbers: Numbers, tensor: Tensor, lambd: float = 1.0, generator: object = None
) -> Tensor:
    return _fill(tensor, -numbers.uniform(tensor.shape, tensor.device).log() / lambd)


@_rule(Tensor.log_normal_)
def _log_normal_in_place(
    numbers: Numbers, tensor: Tensor, mean: float = 1.0, std: float = 2.0, generator: object = None
) -> Tensor:
    return _fill(tensor, (mean + std * numbers.normal(tensor.shape, tensor.device)).exp())


@_rule(Tensor.cauchy_)
def _cauchy_in_place(
    numbers: Numbers,
    tensor: Tensor,
    median: float = 0.0,
    sigma: float = 1.0,
    generator: object = None,
) -> Tensor:
    uniform = numbers.uniform(tensor.shape, tensor.device)
    return _fill(tensor, median + sigma * (torch.pi * (uniform - 0.5)).tan())


@_rule(Tensor.geometric_)
def _geometric_in_place(
    numbers: Numbers, tensor: Tensor, p: float, generator: object = None
) -> Tensor:
    logarithm = numbers.uniform(tensor.shape, tensor.device).log()
    return _fill(tensor, (logarithm / torch.log1p(torch.tensor(-p).double())).ceil().clamp(min=1))


@_rule(Tensor.random_)
def _random_in_place(numbers: Numbers, tensor: Tensor, *bounds: int, **given: Any) -> Tensor:
    high = given.get("to", bounds[-1] if bounds else None)
    low = given.get("from", bounds[0] if len(bounds) > 1 else 0)
    if high is None:
        raise Pass
    return _fill(tensor, low + numbers.integers(tensor.shape, high - low, tensor.device))


# Dropout, where it is on, and other layers.


def _dropped(
    numbers: Numbers, tensor: Tensor, p: float, training: bool, inplace: bool, shape: Sequence[int]
) -> Tensor:
    if not training or p == 0:
        raise Pass
    kept = (numbers.uniform(shape, tensor.device) >= p).to(tensor.dtype)
    factor = kept / (1 - p) if p < 1 else kept
    return tensor.mul_(factor) if inplace else tensor * factor


@_rule(F.dropout)
def _dropout(
    numbers: Numbers, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    return _dropped(numbers, input, p, training, inplace, input.shape)


@_rule(torch.dropout)
def _torch_dropout(numbers: Numbers, input: Tensor, p: float, train: bool) -> Tensor:
    return _dropped(numbers, input, p, train, False, input.shape)


@_rule(torch.dropout_)
def _torch_dropout_in_place(numbers: Numbers, input: Tensor, p: float, train: bool) -> Tensor:
    return _dropped(numbers, input, p, train, True, input.shape)


@_rule(F.dropout1d, F.dropout2d, F.dropout3d)
def _dropout_of_channels(
    numbers: Numbers, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    if input.dim() < 3:
        raise Pass  # one example without a batch axis
    shape = [*input.shape[:2], *[1] * (input.dim() - 2)]
    return _dropped(numbers, input, p, training, inplace, shape)


@_rule(F.alpha_dropout)
def _alpha_dropout(
    numbers: Numbers, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    if not training or p == 0:
        raise Pass
    low = -1.7580993408473766  # the limit of SELU
    kept = (numbers.uniform(input.shape, input.device) >= p).to(input.dtype)
    scale = ((1 - p) * (1 + p * low**2)) ** -0.5 if p < 1 else 0.0
    values = (input * kept + low * (1 - kept) + low * -p) * scale
    return input.copy_(values) if inplace else values


@_rule(F.gumbel_softmax)
def _gumbel_softmax(
    numbers: Numbers,
    logits: Tensor,
    tau: float = 1,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
) -> Tensor:
    noise = -(-numbers.uniform(logits.shape, logits.device).log()).log()
    soft = ((logits + noise.to(logits)) / tau).softmax(dim)
    if not hard:
        return soft
    one_hot = torch.zeros_like(logits).scatter(dim, soft.argmax(dim, keepdim=True), 1.0)
    return one_hot - soft.detach() + soft
