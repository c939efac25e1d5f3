"""Modules that reach their parameters in unusual ways: right, or refused for the true reason.

TracIn is compared with plain autograd on single examples, exact unrolling with central differences
of retrainings by a plain loop. Everything is in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Subset, TensorDataset

from tda_lightning import AttributionModule, Trajectory, TrajectoryRecorder
from tda_lightning.estimators import TracIn, Unrolled
from tda_lightning.records.errors import EngineError, UnsupportedTrainingError
from tda_lightning.runtime.checkpointing import without_reentrant_checkpoints

pytestmark = pytest.mark.filterwarnings(
    "ignore:Per-example gradients of", "ignore:In some batches", "ignore::DeprecationWarning",
    "ignore::FutureWarning", "ignore:.*batching rule.*",
)  # fmt: skip

RATE, SIZE, QUERIES = 0.3, 8, (0, 5)
Step = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class Module(pl.LightningModule):
    def __init__(self, step: Step, **parts: Callable[[], nn.Module] | nn.Parameter) -> None:
        super().__init__()
        self.step = step
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Parameter) else part())
        self.double()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self.step(self, *batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], RATE)


def data() -> TensorDataset:
    torch.manual_seed(2)
    inputs = torch.randn(SIZE, 4, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(3, (SIZE,)), torch.randint(5, (SIZE, 3)))


def recorded(module: nn.Module, path: Path) -> str:
    recorder = TrajectoryRecorder(str(path / "run"), num_checkpoints=1)
    pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[recorder],
    ).fit(module, DataLoader(data(), 4))  # fmt: skip
    return str(path / "run")


def attributed(module: nn.Module, run: str, estimator: object) -> Tensor:
    attribution = AttributionModule(module, run, estimator)  # type: ignore[arg-type]
    return attribution.attribute(data(), Subset(data(), QUERIES), batch_size=3).values


def single(n: int) -> list[Tensor]:
    return [tensor[n : n + 1] for tensor in data().tensors]


def tracin(module: nn.Module, run: str) -> Tensor:
    module.eval()
    trained = [p for p in module.parameters() if p.requires_grad and p.numel()]
    rows = []
    with without_reentrant_checkpoints():  # which refuse autograd.grad
        for n in range(SIZE):
            found = torch.autograd.grad(
                module.training_step(single(n), 0), trained, materialize_grads=True
            )
            rows.append(torch.cat([g.flatten() for g in found]))
    gradients = torch.stack(rows)
    rate = float(Trajectory.load(run).steps.learning_rate[:, 0].sum())
    return rate / SIZE * gradients[list(QUERIES)] @ gradients.T


def built(build: Callable[[], Module]) -> Module:
    """The same module at every call."""
    torch.manual_seed(1)
    return build()


def retrained(build: Callable[[], Module], weights: Tensor) -> Tensor:
    """The measurements after training with weights on the examples."""
    module = built(build)
    optimizer = module.configure_optimizers()
    for start in range(0, SIZE, 4):
        optimizer.zero_grad()
        for n in range(start, start + 4):
            (weights[n] * module.training_step(single(n), 0) / 4).backward()
        optimizer.step()
    module.eval()
    return torch.stack([module.training_step(single(n), 0).detach() for n in QUERIES])


def differences(build: Callable[[], Module]) -> Tensor:
    ones = torch.ones(SIZE, dtype=torch.float64)
    columns = []
    for n in range(SIZE):
        shift = torch.zeros_like(ones)
        shift[n] = 1e-5
        columns.append((retrained(build, ones - shift) - retrained(build, ones + shift)) / 2e-5)
    return torch.stack(columns, 1)


def require_close(found: Tensor, truth: Tensor, bound: float) -> None:
    error = float((found - truth).abs().max() / truth.abs().max())
    assert error < bound, error


def linear() -> nn.Module:
    return nn.Linear(4, 3)


def square() -> nn.Module:
    return nn.Linear(4, 4)


def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def of_input(m: nn.Module, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    return F.cross_entropy(m.f(x), y)


def requiring(m: nn.Module, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    return F.cross_entropy(m.f(x.clone().requires_grad_()), y)


def force(m: nn.Module, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    """The derivative by the inputs is what is fitted."""
    at = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(m.f(at).tanh().sum(), at, create_graph=True)
    return F.mse_loss(slope, x)


def penalized(weight: float) -> Step:
    """A gradient penalty; with a small weight it is below what a sum in float32 would show."""

    def step(m: nn.Module, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
        at = x.clone().requires_grad_()
        outputs = m.g(m.f(at).tanh())
        (slope,) = torch.autograd.grad(outputs.sum(), at, create_graph=True)
        return F.cross_entropy(outputs, y) + weight * F.mse_loss(slope, torch.zeros_like(slope))

    return step


def hessian_by_inputs(m: nn.Module, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    """A physics-informed loss: second derivatives by the inputs."""
    at = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(m.f(at).tanh().sum(), at, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), at, create_graph=True)
    return F.mse_loss(bend + slope, x)


def equation(m: nn.Module, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    """A differential equation of the outputs, as a loss that is no standard one."""
    at = x.clone().requires_grad_()
    outputs = m.f(at).tanh()
    (slope,) = torch.autograd.grad(outputs.sum(), at, create_graph=True)
    return (slope.sum(1) - outputs.sum(1)).square().mean()


def by_torch_func(m: nn.Module, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    slope = torch.func.vmap(torch.func.grad(lambda row: m.f(row).tanh().sum()))(x)
    return F.mse_loss(slope, x)


def frozen_below(m: nn.Module, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    """What ``enable_input_require_grads`` does to a frozen embedding under an adapter."""
    return F.cross_entropy(m.f(m.e(i).sum(1).requires_grad_()), y)


def checkpointed(reentrant: bool) -> Step:
    def step(m: nn.Module, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
        hidden = checkpoint(m.f, m.g(x), use_reentrant=reentrant)
        return F.cross_entropy(hidden, y)

    return step


def untracked(m: nn.Module, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    """No argument requires a gradient, so that this kind of checkpoint trains nothing in it."""
    return F.cross_entropy(m.g(checkpoint(m.f, x, use_reentrant=True)), y)


def keywords(m: nn.Module, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    hidden = F.linear(weight=m.f.weight, bias=m.f.bias, input=x)
    scaled = torch.mul(input=m.w, other=hidden)
    return F.cross_entropy(input=torch.add(input=scaled, other=m.b, alpha=2), target=y)


def keyword_product(m: nn.Module, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    return F.cross_entropy(torch.matmul(input=x, other=m.w) + torch.mul(input=m.f(x), other=2), y)


def spectrum(m: nn.Module, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    """A real weight on complex numbers."""
    return F.mse_loss((torch.fft.rfft(m.f(x)) * m.w).abs(), torch.fft.rfft(x[:, :3]).abs())


def with_empty(m: nn.Module, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    return F.cross_entropy(m.f(x), y) + m.e(x).sum()


def time_first(m: nn.Module, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    return F.cross_entropy(m.g(m.f(m.e(i).transpose(0, 1))[0][-1]), y)


def packed(m: nn.Module, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    lengths = i[:, 0].clamp(1, 3)
    sequence = pack_padded_sequence(m.e(i), lengths, batch_first=True, enforce_sorted=False)
    return F.cross_entropy(m.g(m.f(sequence)[1][0]), y)


def grouped(m: nn.Module, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    return F.cross_entropy(m.g(m.n(m.f(x)[:, :, None]).flatten(1)), y)


def one_by_one(m: nn.Module, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    """A recurrent layer that sees one sequence at a time, without an axis for the batch."""
    last = torch.stack([m.f(sequence)[0][-1] for sequence in m.e(i)])
    return F.cross_entropy(m.g(last), y)


def attended(m: nn.Module, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    """Attention with time first, and positions that are asked once for all examples."""
    hidden = (m.e(i) + m.p(torch.arange(3))).transpose(0, 1)
    return F.cross_entropy(m.g(m.f(hidden, hidden, hidden)[0][0]), y)


def relative_bias(m: nn.Module, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    """A table of distances added to the scores of every example and head."""
    distance = torch.arange(3)[:, None] - torch.arange(3) + 2
    words = m.e(i)
    bias = m.p(distance).squeeze(-1)
    mixed = F.scaled_dot_product_attention(words, words, words, attn_mask=bias)
    return F.cross_entropy(m.g(mixed.sum(1)), y)


def looked_up(m: nn.Module, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    return F.cross_entropy(m.g(m.e(i).sum(1)), y)


class Clamped(nn.Linear):
    """Its weight is brought back into a box at every call."""

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.2, 0.2)
        return super().forward(inputs)


class Flagged(nn.Module):
    """Checkpoints itself where a flag is set, and only in training, as Hugging Face models do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gradient_checkpointing = deep(), True

    def forward(self, inputs: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return checkpoint(self.body.__call__, inputs, use_reentrant=True)
        return self.body(inputs)


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        context.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(context, gradient):
        (x,) = context.saved_tensors
        return gradient * (1 - x.tanh() ** 2)


def custom(m: nn.Module, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    return F.cross_entropy(m.g(_Tanh.apply(m.f(x))), y)


def hooked(hook: Callable[[Tensor], Tensor | None]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = nn.Linear(4, 3)
        layer.weight.register_hook(hook)
        return layer

    return build


def later_hooked(hook: Callable[[Tensor], None]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = nn.Linear(4, 3)
        layer.weight.register_post_accumulate_grad_hook(hook)
        return layer

    return build


def module_hooked(change: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layers = deep()
        layers[2].register_full_backward_hook(lambda m, inputs, _: (change(inputs[0]),))
        return layers

    return build


def first_row_held(gradient: Tensor) -> Tensor:
    return gradient * torch.tensor([[0.0], [1.0], [1.0]]).to(gradient)


def halved_in_place(parameter: Tensor) -> None:
    parameter.grad.mul_(0.5)


def held_in_place(parameter: Tensor) -> None:
    parameter.grad[0] = 0


EMBEDDED = {"e": lambda: nn.Embedding(5, 4), "g": linear}
RIGHT: dict[str, Callable[[], Module]] = {
    "input requires a gradient": lambda: Module(requiring, f=linear),
    "force": lambda: Module(force, f=linear),
    "gradient penalty": lambda: Module(penalized(0.1), f=square, g=linear),
    "small gradient penalty": lambda: Module(penalized(1e-8), f=square, g=linear),
    "physics": lambda: Module(hessian_by_inputs, f=linear),
    "equation": lambda: Module(equation, f=linear),
    "torch.func": lambda: Module(by_torch_func, f=linear),
    "frozen below": lambda: Module(
        frozen_below, e=lambda: nn.Embedding(5, 4).requires_grad_(False), f=linear
    ),
    "checkpoint": lambda: Module(checkpointed(False), g=square, f=deep),
    "reentrant checkpoint": lambda: Module(checkpointed(True), g=square, f=deep),
    "untracked checkpoint": lambda: Module(untracked, f=square, g=linear),
    "keywords": lambda: Module(
        keywords, f=linear, w=nn.Parameter(torch.rand(3) + 1), b=nn.Parameter(torch.rand(3))
    ),
    "keyword product": lambda: Module(keyword_product, f=linear, w=nn.Parameter(torch.rand(4, 3))),
    "script": lambda: Module(of_input, f=lambda: torch.jit.script(deep())),
    "trace": lambda: Module(of_input, f=lambda: torch.jit.trace(deep(), torch.rand(2, 4))),
    "complex activations": lambda: Module(spectrum, f=linear, w=nn.Parameter(torch.rand(2))),
    "empty parameters": lambda: Module(with_empty, f=linear, e=lambda: nn.Linear(4, 0)),
    "hook that looks": lambda: Module(of_input, f=hooked(lambda gradient: None)),
    "hook that holds a row": lambda: Module(of_input, f=hooked(first_row_held)),
    "backward hook": lambda: Module(of_input, f=module_hooked(lambda g: g * 1)),
    "weight norm": lambda: Module(of_input, f=lambda: parametrizations.weight_norm(linear())),
    "old weight norm": lambda: Module(of_input, f=lambda: nn.utils.weight_norm(linear())),
    "time first": lambda: Module(time_first, f=lambda: nn.LSTM(4, 4), **EMBEDDED),
    "packed": lambda: Module(packed, f=lambda: nn.GRU(4, 4), **EMBEDDED),
    "group norm": lambda: Module(grouped, f=square, n=lambda: nn.GroupNorm(2, 4), g=linear),
    "flagged": lambda: Module(lambda m, x, y, i: of_input(m, m.h(x), y, i), f=Flagged, h=square),
    "one by one": lambda: Module(one_by_one, f=lambda: nn.LSTM(4, 4), **EMBEDDED),
    "attention": lambda: Module(
        attended, f=lambda: nn.MultiheadAttention(4, 2), p=lambda: nn.Embedding(3, 4), **EMBEDDED
    ),
    "relative bias": lambda: Module(relative_bias, p=lambda: nn.Embedding(5, 1), **EMBEDDED),
    "custom function": lambda: Module(custom, f=square, g=linear),
}
NOT_UNROLLED = (  # there is nothing in them that another kind does not show
    "trace", "keywords", "keyword product", "input requires a gradient", "small gradient penalty",
    "frozen below", "checkpoint", "untracked checkpoint", "hook that looks", "backward hook",
    "old weight norm", "one by one", "packed", "relative bias", "complex activations",
)  # fmt: skip


@pytest.mark.parametrize("kind", RIGHT)
def test_scores_are_those_of_plain_autograd_and_of_retraining(kind: str, tmp_path: Path) -> None:
    module = built(RIGHT[kind])
    run = recorded(module, tmp_path)
    require_close(attributed(module, run, TracIn()), tracin(module, run), 1e-12)
    if kind not in NOT_UNROLLED:
        require_close(attributed(module, run, Unrolled()), differences(RIGHT[kind]), 1e-7)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (
            lambda: Module(
                lambda m, x, y, i: F.mse_loss(
                    torch.fft.irfft(torch.fft.rfft(x) * m.w.to(torch.complex128), n=4), x
                ),
                w=nn.Parameter(torch.randn(3, dtype=torch.complex128)),
            ),
            "w is complex.*view_as_complex",
        ),
        (lambda: Module(of_input, f=hooked(lambda g: g / 2)), "f.weight.*multiplies its gradient"),
        (lambda: Module(of_input, f=hooked(lambda g: g.clamp(-1, 1))), "f.weight.*clips"),
        (lambda: Module(of_input, f=hooked(lambda g: g / g.norm())), "f.weight.*normalises"),
        (lambda: Module(of_input, f=hooked(lambda g: g - g.mean(1, True))), "f.weight.*mixes"),
        (lambda: Module(of_input, f=later_hooked(halved_in_place)), "multiplies its gradient"),
        (lambda: Module(of_input, f=later_hooked(held_in_place)), "Use register_hook"),
        (
            lambda: Module(of_input, f=module_hooked(lambda g: g / g.norm())),
            "not in proportion to the loss.*hook that clips or normalises",
        ),
        (
            lambda: Module(
                lambda m, x, y, i: F.cross_entropy(m.g(m.e(i)), y),
                e=lambda: nn.EmbeddingBag(5, 4, max_norm=1.0),
                g=linear,
            ),
            "max_norm.*rewrites the table",
        ),
        (
            lambda: Module(
                lambda m, x, y, i: F.cross_entropy(m.g(m.e(i).sum(1)), y),
                e=lambda: nn.Embedding(5, 4, max_norm=1.0),
                g=linear,
            ),
            "max_norm.*rewrites the table",
        ),
        (
            lambda: Module(
                lambda m, x, y, i: F.cross_entropy(m.g(m.e(i)), y),
                e=lambda: nn.EmbeddingBag(5, 4, mode="sum", scale_grad_by_freq=True),
                g=linear,
            ),
            "scale_grad_by_freq.*depends on the whole batch",
        ),
    ],
)
def test_refusals_name_the_true_cause(build, words: str, tmp_path: Path) -> None:
    module = build()
    run = recorded(module, tmp_path)
    with pytest.raises(EngineError, match=words) as raised:
        attributed(module, run, TracIn())
    assert "contrastive" not in str(raised.value)


def test_a_sparse_table_is_scored_and_unrolled(tmp_path: Path) -> None:
    """Its gradients are sparse, of which neither norms nor second derivatives are known."""
    build = lambda: Module(looked_up, e=lambda: nn.Embedding(5, 4, sparse=True), g=linear)  # noqa: E731
    module = built(build)
    run = recorded(module, tmp_path)
    found = attributed(module, run, TracIn())
    module.e.sparse = False
    require_close(found, tracin(module, run), 1e-12)
    module.e.sparse = True
    require_close(attributed(module, run, Unrolled()), differences(build), 1e-7)


def test_a_step_that_rewrites_a_parameter_is_not_unrolled(tmp_path: Path) -> None:
    module = built(lambda: Module(of_input, f=lambda: Clamped(4, 3)))
    run = recorded(module, tmp_path)
    with pytest.raises(UnsupportedTrainingError, match="rewrites parameter f.weight"):
        attributed(module, run, Unrolled())


def test_a_spectral_norm_is_scored_and_not_unrolled(tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = Module(of_input, f=lambda: parametrizations.spectral_norm(linear()))
    run = recorded(module, tmp_path)
    require_close(attributed(module, run, TracIn()), tracin(module, run), 1e-12)
    with pytest.raises(UnsupportedTrainingError, match="buffer .* changes while the model trains"):
        attributed(module, run, Unrolled())


def test_words_of_a_frozen_table_with_max_norm_that_only_queries_hold(tmp_path: Path) -> None:
    """Each look-up rescales its own rows, in training and in attribution."""

    def step(m: nn.Module, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
        return F.cross_entropy(m.f(m.e(i).sum(1)), y)

    def table() -> nn.Module:
        embedding = nn.Embedding(5, 4, max_norm=1.0)
        embedding.weight.requires_grad_(False).mul_(5)
        return embedding

    module = Module(step, e=table, f=linear)
    run = recorded(module, tmp_path)
    require_close(attributed(module, run, TracIn()), tracin(module, run), 1e-12)
