"""Watch a forward pass and note every use of a trained parameter.

A ``TorchFunctionMode`` sees the functional calls that modules end in (``F.linear``,
``F.conv2d``, ...), so a parameter is known by identity, whoever uses it and however often: tied
weights, a layer called several times and ``F.linear(x, other.weight)`` need no special case.
Each call is made exactly as the user's code makes it. What it was given is noted, and the edge of
the graph at which its output's gradient will arrive: a backward pass to those edges never spends
time on weight gradients that would be thrown away.

A layer that is asked once for all examples (an embedding of positions, looked up with ``arange``)
has one output for the batch. Where it is broadcast to what each example has, the gradient of the
result is that of its output for each example (``shared_outputs.py``).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from tda_lightning.gradients.fused_layers import FUSED
from tda_lightning.gradients.moving import may_move
from tda_lightning.gradients.operations import OPERATIONS
from tda_lightning.gradients.parameter_views import ParameterViews
from tda_lightning.gradients.pooling import faster
from tda_lightning.gradients.shared_outputs import SharedOutput, SharedOutputs
from tda_lightning.gradients.uses import Linear, Ref, Use, WatchedOutput
from tda_lightning.records.errors import EngineError

# Reading these of a parameter does not make a result depend on its values.
_METADATA = frozenset(
    "__get__ __len__ __repr__ __hash__ size dim ndimension numel stride storage_offset "  # noqa: SIM905
    "is_floating_point is_complex is_contiguous data_ptr element_size get_device detach".split()
)
# ... but these attributes are views of the values.
_VALUE_GETTERS = frozenset(
    getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag")
)
_ATTENTION = inspect.Signature(
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in (
            ("query", None), ("key", None), ("value", None), ("attn_mask", None),
            ("dropout_p", 0.0), ("is_causal", False), ("scale", None), ("enable_gqa", False),
        )
    ]
)  # fmt: skip
# Casts, which may be to a coarser precision than the module's.
_CASTS = frozenset(("to", "type", "type_as", "float", "half", "bfloat16"))


class Capture(TorchFunctionMode):
    """Notes every :class:`Use` of trained parameters while active.

    Attention and recurrent layers are taken apart into the linear maps they consist of; without
    trained parameters that is all the mode does.

    Args:
        trained: names of the trained parameters by ``id``. They must require gradients.
        batch: number of examples, where it matters whether some call may move them.

    Attributes:
        watched: the uses, in the order of the calls.
        generic: names of parameters that were used in some way without a native form.
        twice: those of them that a backward pass within the losses uses once more.
        moves: whether a call was seen that may put examples at other places than their own.
        eps: of the coarsest precision that numbers were cast to.
    """

    def __init__(self, trained: Mapping[int, str], batch: int = 1):
        super().__init__()
        self.trained = trained
        self.batch = batch
        self.moves = False
        self.eps = 0.0
        self.watched: list[WatchedOutput] = []
        self.generic: set[str] = set()
        self.twice: set[str] = set()
        self._shared = SharedOutputs()
        self._replaced: set[Use] = set()  # by uses for every example
        self._views = ParameterViews(trained)

    @property
    def uses(self) -> list[Use]:
        """Every use noted so far."""
        return [output for output in self.watched if isinstance(output, Use)]

    def __torch_function__(  # type: ignore[override]
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if not self.moves and self.batch > 1:
            self.moves = may_move(func, args, kwargs, self.batch)
        if func in FUSED:
            return self.fused(func, args, kwargs)
        if func is torch.autograd.grad and kwargs.get("create_graph"):
            # The backward pass that follows uses the parameters of the forward pass once more.
            self.twice.update(ref.name for use in self.uses for ref in use.refs)
            self.generic.update(self.twice)
        names = list(self._names((*args, *kwargs.values())))
        if not names or (func.__name__ in _METADATA and func not in _VALUE_GETTERS):
            if func is F.scaled_dot_product_attention:
                args, kwargs = self.with_own_biases(args, kwargs)
            output = faster(func)(*args, **kwargs)
            if func.__name__ in _CASTS:
                self._note_precision(output)
            elif isinstance(output, Tensor) and output.requires_grad:
                self._follow(func.__name__, (*args, *kwargs.values()), output)
            return output
        if func is F.embedding_bag:
            _require_no_norm(args, kwargs, self.trained)
        if (view := self._views.made_by(func, args)) is not None:
            output = func(*args, **kwargs)
            self._views.note(output, view)
            return output
        with torch.no_grad():
            use: Use | None = self._views.describe(func, args, kwargs)
            describe = None if use or self._views.among(args) else OPERATIONS.get(func)
            if describe is not None:
                use = describe(self.ref, *args, **kwargs)
        # A parameter fed in as an input (learned queries) has no native form.
        self.generic.update(Counter(names) - Counter(ref.name for ref in (use.refs if use else ())))
        output = func(*args, **kwargs)
        if use is not None:
            self.note(use, output)
        return output

    def fused(
        self, func: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        """The output of a fused layer, its linear maps noted one by one."""
        before = len(self.watched)
        output = FUSED[func](self.linear, func, *args, **kwargs)
        if torch.is_grad_enabled():
            new = [use for use in self.watched[before:] if isinstance(use, Use)]
            seen = {ref.name for use in new for ref in use.refs}
            self.generic.update(set(self._names((*args, *kwargs.values()))) - seen)
        return output

    def linear(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        rows: slice | None = None,
        bias_rows: slice | None = None,
    ) -> Tensor:
        """``F.linear`` with the given rows of weight and bias, noted."""
        self.generic.update(self._names((inputs,)))
        bias_rows = bias_rows or rows
        used = weight if rows is None else weight[rows]
        used_bias = bias if bias is None or bias_rows is None else bias[bias_rows]
        output = F.linear(inputs, used, used_bias)
        use = Linear(self.ref(weight, rows), self.ref(bias, bias_rows), inputs.detach())
        self.note(use, output)
        return output

    def _note_precision(self, output: object) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and output.dim():
            self.eps = max(self.eps, torch.finfo(output.dtype).eps)

    def ref(self, tensor: Tensor | None, rows: slice | None = None) -> Ref | None:
        """The given rows of a trained parameter; None for any other tensor."""
        if tensor is None or (name := self.trained.get(id(tensor))) is None:
            return None
        height = tensor.shape[0] if tensor.dim() else 1
        start, stop, _ = (rows or slice(None)).indices(height)
        return Ref(name, start, stop, height)

    def note(self, use: Use, output: Tensor) -> None:
        """Watch the output of a use; under ``no_grad()`` a parameter is a constant."""
        if torch._C._functorch.is_functorch_wrapped_tensor(output):  # torch.func in the loss
            self.generic.update(ref.name for ref in use.refs)
        elif use.refs and output.requires_grad:
            use.output_shape = output.shape
            self._shared.add(use, output)
            self.watch(use, output)

    def _follow(self, name: str, given: Sequence[object], output: Tensor) -> None:
        """Note what the output of a use is broadcast to."""
        for shared in self._shared.follow(name, given, output):
            self.broadcast(shared, output)

    def broadcast(self, shared: SharedOutput, output: Tensor) -> None:
        """Put uses as if they were called for every example in the place of one whose output was
        broadcast to ``output``. If it is used elsewhere too, its gradients do not add up, and
        it has no native form (``GradientEngine.discover``)."""
        expanded = shared.for_each_example(output)
        if expanded is None:
            return
        expanded.edge = get_gradient_edge(output)
        if shared.use in self._replaced:  # in the layer before
            self.watched.append(expanded)
        elif shared.use in self.watched:
            self.watched[self.watched.index(shared.use)] = expanded
            self._replaced.add(shared.use)

    def with_own_biases(
        self, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """The arguments of an attention with a bias for each example where one use's output is the
        bias of all: its gradient for each is seen in no output."""
        given = _ATTENTION.bind(*args, **kwargs)
        bias, query, key = (given.arguments.get(name) for name in ("attn_mask", "query", "key"))
        shared = self._shared.get(bias)
        if shared is None or not isinstance(query, Tensor) or not isinstance(key, Tensor):
            return args, kwargs
        own = shared.value.expand(*query.shape[:-1], key.shape[-2])
        if own.shape != shared.value.shape:
            self.broadcast(shared, own)
        if "attn_mask" in kwargs:
            return args, {**kwargs, "attn_mask": own}
        return (*args[:3], own, *args[4:]), kwargs

    def watch(self, watched: WatchedOutput, output: Tensor) -> None:
        """Have the gradient of ``output`` arrive at ``watched``."""
        # The edge stays this call's own, whatever is done to the output in place.
        watched.edge = get_gradient_edge(output)
        self.watched.append(watched)

    def backward(
        self,
        outputs: Sequence[Tensor],
        gradients: Sequence[Tensor] | None = None,
        parameters: Sequence[Tensor] = (),
    ) -> list[Tensor | None]:
        """Carry ``gradients`` of ``outputs`` (1 by default) to all that is watched.

        The graph is kept. What they do not reach has the gradient None afterwards.

        Returns:
            The gradient of each of ``parameters``; leave them out to spare their cost.
        """
        self.forget()
        inputs: list[Any] = [*(watched.edge for watched in self.watched), *parameters]
        if not inputs or not any(output.requires_grad for output in outputs):
            return [None] * len(parameters)
        arrived = torch.autograd.grad(
            outputs, inputs, gradients, retain_graph=True, allow_unused=True
        )
        for watched, gradient in zip(self.watched, arrived, strict=False):
            watched.arrive(gradient)
        return list(arrived[len(self.watched) :])

    def forget(self) -> None:
        """Forget the gradients that have arrived; another backward pass brings others."""
        for watched in self.watched:
            watched.gradient = None

    def _names(self, values: Iterable[object]) -> Iterator[str]:
        """The trained parameters among ``values``, as often as they occur."""
        for value in values:
            if isinstance(value, Tensor):
                if id(value) in self.trained:
                    yield self.trained[id(value)]
                elif (view := self._views.get(value)) is not None:
                    yield view.ref.name
            elif isinstance(value, (list, tuple)):
                yield from self._names(value)


def _require_no_norm(
    args: Sequence[object], kwargs: Mapping[str, object], trained: Mapping[int, str]
) -> None:
    given = inspect.signature(F.embedding_bag).bind(*args, **kwargs).arguments
    name = trained.get(id(given["weight"]))
    if name is not None and given.get("max_norm") is not None:
        raise EngineError(
            f"Parameter {name}: an embedding with max_norm has no per-example gradient (it "
            "rewrites the table in the forward pass). Train without it, or freeze the embedding."
        )
