"""Contexts of single models, and dense curvature in the order of their rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.data import Dataset, TensorDataset

from tda_lightning.curvature.products import as_rows
from tda_lightning.gradients import GradientEngine
from tda_lightning.records.score_sinks import MemorySink
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.session.session import Session
from tda_lightning.tasks import AttributionTask
from tests import oracles
from tests.attributing import CaseTask
from tests.cases import Case


def context_of(module: nn.Module, task: AttributionTask, data: Dataset[Any], size: int) -> Session:
    """A context that knows the module as it is, and no trajectory."""
    source = ExampleSource.of(data, size, "training")
    count = len(source)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    context = Session(
        module=module,
        task=task,
        trajectory=SimpleNamespace(data_weights=None),  # type: ignore[arg-type]
        engine=GradientEngine(module, names),
        scores=MemorySink(1, count),
        num_train=count,
        num_query=1,
        examples=source,
        queries=lambda start, stop: [],
        cache_key=lambda steps: "",
        batch_size=size,
    )
    batch, examples = next(iter(context.batches([range(count)])))
    task.prepare(module, batch)
    context.engine.discover(context.train_loss, batch, examples, task.one_by_one)
    return context


def case_context(case: Case, examples: int = 6, size: int = 4) -> tuple[Session, Any]:
    """The context of a case with its data, in batches that do not divide it."""
    module, data = case.build(), case.batch(examples)
    return context_of(module, CaseTask(case.kind), TensorDataset(*data), size), data


def in_rows(context: Session, matrix: Tensor) -> Tensor:
    """A matrix over the parameters of ``context.engine.names``, ordered as rows are."""
    first, places = 0, {}
    for name in context.engine.names:
        like = context.module.get_parameter(name)
        places[name] = torch.arange(first, first + like.numel()).view(like.shape)
        first += like.numel()
    order = as_rows(context.blocks, places)
    return matrix[order][:, order]


class _WeightNormByDefinition(TorchFunctionMode):
    """torch's own has a wrong second derivative (2.13; central differences of its gradient)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch._weight_norm:
            return func(*args, **(kwargs or {}))
        v, g, *rest = args
        dim = rest[0] if rest else (kwargs or {}).get("dim", 0)
        axes = [axis for axis in range(v.dim()) if axis != dim]
        return v * (g / v.square().sum(axes, keepdim=True).sqrt())


def dense_curvature(context: Session, case: Case, data: Any, kind: str) -> Tensor:
    """The curvature of a case's mean loss by loops, in the order of rows."""
    names, module = context.engine.names, context.module
    if kind == "gauss_newton":
        return in_rows(context, oracles.gauss_newton(module, case.criterion, data, names))
    # The fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH), _WeightNormByDefinition():
        parameters = [module.get_parameter(name) for name in names]
        gradient = torch.autograd.grad(
            case.loss(module, data).mean(), parameters, allow_unused=True
        )
        used = [name for name, part in zip(names, gradient, strict=True) if part is not None]
        inner = oracles.loss_hessian(module, case.loss, data, used)
    where = torch.cat(
        [torch.full((p.numel(),), n in used) for n, p in zip(names, parameters, strict=True)]
    )
    matrix = inner.new_zeros(len(where), len(where))
    matrix[where.nonzero(), where.nonzero().T] = inner
    return in_rows(context, matrix)
