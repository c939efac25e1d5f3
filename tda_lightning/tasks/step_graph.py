"""The operations of a training step, noted while it runs, so that its loss can be taken apart.

A ``TorchFunctionMode`` sees every torch function that user code calls. Each call becomes a
:class:`Node`: what it was given, and its value. Losses of ``torch.nn.functional`` that reduce are
run as their elements and the reduction, two nodes, so that whoever reads the graph needs to know
reductions alone. Nothing else is changed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tda_lightning.tasks.loss_calls import (
    READERS,
    Given,
    LossCall,
    LossFunction,
    given_by_name,
    inside_transform,
    reduction_of,
)
from tda_lightning.tasks.noise_rules import RULES

_SMALL = 4096  # elements: the largest tensor of which a copy is kept when it is changed in place
_IN_PLACE = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__"}


@dataclass(eq=False)
class Node:
    """One call of a torch function, or a tensor that came from elsewhere (``func`` is None).

    Attributes:
        name: of the function, without the underscores of operators and of in-place forms.
        args, kwargs: as given, with the nodes of tensors in their place.
        value: what it returned.
        output: which of several outputs ``value`` is.
        of_data: whether it depends on anything but parameters, buffers and constants.
        order: position among the calls.
        inputs: the nodes among the arguments, in their order.
        of_module: the module with parameters that returned it last.
        moved: whether rows were picked or reordered on the way, by what is in the data: which
            example a row is of can then not be told by shapes.
        constant: whether the value stays when the inputs change: noise, and what was computed
            without gradients.
        by_mass: whether it divides by what a loss of torch's own says is the mass of its mean.
    """

    name: str
    func: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    value: Tensor
    output: int | None
    of_data: bool
    order: int
    inputs: list[Node] = field(default_factory=list)
    of_module: nn.Module | None = None
    moved: bool = False
    constant: bool = False
    by_mass: bool = False

    def with_inputs(self, inputs: Sequence[Node], value: Tensor) -> Node:
        """The same call of other inputs, which gave ``value``."""
        given = iter(inputs)
        args = _exchanged(self.args, given)
        kwargs = _exchanged(self.kwargs, given)
        return replace(self, args=args, kwargs=kwargs, value=value, inputs=list(inputs))


# Losses whose elements are reduced as torch reduces them: ``"mean"`` is the mean of the elements.
_PLAIN_LOSSES: frozenset[LossFunction] = frozenset(
    {
        F.binary_cross_entropy,
        F.cosine_embedding_loss,
        F.gaussian_nll_loss,
        F.hinge_embedding_loss,
        F.huber_loss,
        F.l1_loss,
        F.margin_ranking_loss,
        F.multi_margin_loss,
        F.multilabel_margin_loss,
        F.multilabel_soft_margin_loss,
        F.poisson_nll_loss,
        F.smooth_l1_loss,
        F.soft_margin_loss,
        F.triplet_margin_loss,
        F.triplet_margin_with_distance_loss,
    }
)
_OTHER_LOSSES: frozenset[LossFunction] = frozenset({F.kl_div, F.ctc_loss})


class StepGraph(TorchFunctionMode):
    """Notes every call while active.

    Args:
        module: its parameters, buffers and tensors are not data.
        zero: is added to the elements of losses, to connect them to it.

    Attributes:
        calls: of the losses whose Gauss-Newton matrix is known, in order.
    """

    def __init__(self, module: nn.Module, zero: Tensor | None = None) -> None:
        super().__init__()
        self.zero = zero
        self.calls: list[LossCall] = []
        self._nodes: dict[int, Node] = {}
        self._order = 0
        for tensor in (*module.parameters(), *module.buffers(), *_constants(module)):
            self._nodes[id(tensor)] = Node("", None, (), {}, tensor, None, False, 0)

    def __enter__(self) -> StepGraph:
        self._hook = register_module_forward_hook(self._returned)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hook.remove()

    def _returned(self, module: nn.Module, inputs: object, output: object) -> None:
        if next(module.parameters(), None) is None:
            return
        for tensor in pytree.tree_leaves(output):
            if isinstance(tensor, Tensor) and id(tensor) in self._nodes:
                self._nodes[id(tensor)].of_module = module

    def node(self, tensor: Tensor) -> Node:
        """The call that returned ``tensor``; a node of its own for a tensor from elsewhere."""
        known = self._nodes.get(id(tensor))
        # What a Function computes without gradients gets its own afterwards.
        if known is None or (known.constant and tensor.requires_grad):
            known = Node("", None, (), {}, tensor, None, True, self._order)
            self._nodes[id(tensor)] = known
        return known

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func in READERS or func in _PLAIN_LOSSES or func in _OTHER_LOSSES:
            return self._loss(func, args, kwargs)
        return self._call(func, args, kwargs)

    def _call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        name = getattr(func, "__name__", "")
        in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        if in_place and args and isinstance(args[0], Tensor):
            self._keep_old_value(args[0])
        output = func(*args, **kwargs)
        if isinstance(output, Tensor):
            self._note(func, name, args, kwargs, output, None)
        elif name == "__setitem__":
            self._note(func, name, args, kwargs, args[0], None)
        elif isinstance(output, (tuple, list)):
            for number, part in enumerate(output):
                if isinstance(part, Tensor):
                    self._note(func, name, args, kwargs, part, number)
        return output

    def _note(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Tensor,
        number: int | None,
    ) -> None:
        args, kwargs = _positional(args, kwargs)
        inputs: list[Node] = []
        node_args = tuple([self._with_nodes(value, inputs) for value in args])
        node_kwargs = {name: self._with_nodes(value, inputs) for name, value in kwargs.items()}
        unchanged = number is None and len(inputs) == 1 and inputs[0].value is output
        if unchanged and not name.endswith("_"):  # contiguous(), float() of a float
            return
        if name.endswith("_") and not name.endswith("__"):
            func = getattr(Tensor, name[:-1], func)
        self._order += 1
        self._nodes[id(output)] = Node(
            _plain_name(name),
            func,
            node_args,
            node_kwargs,
            output,
            number,
            func in RULES or any(node.of_data for node in inputs),  # noise is data
            self._order,
            inputs,
            constant=not torch.is_grad_enabled() or _draws(func),
            moved=any(node.moved for node in inputs) or _moves(name, node_args, node_kwargs),
        )

    def _with_nodes(self, value: Any, inputs: list[Node]) -> Any:
        if type(value) in _SCALARS:
            return value
        if isinstance(value, Tensor):
            node = self.node(value)
            inputs.append(node)
            return node
        if isinstance(value, (tuple, list)):
            return _like(value, [self._with_nodes(part, inputs) for part in value])
        if isinstance(value, dict):
            return {key: self._with_nodes(part, inputs) for key, part in value.items()}
        return value

    def _keep_old_value(self, tensor: Tensor) -> None:
        """What a node holds must not change with the tensor that it returned."""
        old = self._nodes.get(id(tensor))
        if old is not None and old.func is not None and tensor.numel() <= _SMALL:
            old.value = tensor.clone()

    # Losses that reduce.

    def _loss(self, func: LossFunction, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        given = given_by_name(func, args, kwargs)
        reduction = reduction_of(given)
        if func in READERS:
            mass: Tensor | None
            loss, mass = READERS[func](lambda: self._elements(func, given), given)
            self.calls.append(LossCall(loss, mass, reduction))
            values = loss.values
        else:
            values, mass = self._elements(func, given), None
        if reduction == "none":
            # The caller may change its copy in place.
            return self._call(torch.clone, (values,), {})
        if func is F.ctc_loss and reduction == "mean":
            lengths = given["target_lengths"]
            lengths = torch.as_tensor(lengths, device=values.device).clamp(min=1)
            values = self._call(torch.div, (values, lengths.to(values)), {})
        if reduction == "sum":
            return self._call(torch.sum, (values,), {})
        if reduction == "batchmean":
            total = self._call(torch.sum, (values,), {})
            return self._over_mass(total, len(values))
        if mass is None:
            return self._call(torch.mean, (values,), {})
        total = self._call(torch.sum, (values,), {})
        # By its elements, so that the mass of each example is known.
        self._nodes[id(mass)] = Node("", None, (), {}, mass, None, True, self._order)
        shaped = self._call(torch.reshape, (mass, values.shape), {})
        return self._over_mass(total, self._call(torch.sum, (shaped,), {}))

    def _over_mass(self, total: Tensor, mass: Tensor | int) -> Tensor:
        divided: Tensor = self._call(torch.div, (total, mass), {})
        self.node(divided).by_mass = True
        return divided

    def _elements(self, func: LossFunction, given: Given) -> Tensor:
        values: Tensor = self._call(func, (), {**given, "reduction": "none"})
        if self.zero is not None:
            return self._call(torch.add, (values, self.zero.to(values.dtype)), {})  # type: ignore[no-any-return]
        if not values.requires_grad and not inside_transform() and torch.is_grad_enabled():
            # Where nothing requires a gradient, a leaf is enough to find the weights of the
            # elements.
            leaf = values.detach().requires_grad_()
            self._nodes[id(leaf)] = self._nodes[id(values)]
            self._nodes[id(leaf)].value = leaf
            return leaf
        return values


_PICKING = {"masked_select", "nonzero", "argwhere", "unique", "unique_consecutive", "topk",
            "_pack_padded_sequence"}  # fmt: skip
_ALONG = {"index_select", "gather", "take_along_dim", "index_add", "scatter", "scatter_add",
          "repeat_interleave"}  # fmt: skip
_LOOKUPS = {"index_select", "gather", "take_along_dim"}


# What most modules hold beside tensors, and calls are given.
_SCALARS = frozenset({NoneType, bool, int, float, str, torch.dtype, torch.device})
_WITHOUT_TENSORS = _SCALARS | {dict, OrderedDict, set}


def _positional(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Operands by position, where they were given by name."""
    if not kwargs:
        return args, kwargs
    named = dict(kwargs)
    for name in ("input", "tensors", "other"):
        if name in named and len(args) == (1 if name == "other" else 0):
            args = (*args, named.pop(name))
    return args, named


def _constants(module: nn.Module) -> Iterator[Tensor]:
    """Tensors that parts of the module hold as plain attributes, and those of objects that they
    hold: the tables of a noise scheduler."""
    held = [
        value
        for part in module.modules()
        for value in vars(part).values()
        if type(value) not in _WITHOUT_TENSORS
    ]
    objects = {id(value): value for value in held if _holds_values(value)}
    inside = [vars(value).values() for value in objects.values()]
    for value in (*held, *(value for values in inside for value in values)):
        if isinstance(value, Tensor):
            yield value


def _holds_values(value: object) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, (Tensor, nn.Module, type))


def _draws(func: Callable[..., Any]) -> bool:
    return func in RULES and "drop" not in getattr(func, "__name__", "")


def _moves(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call picks or reorders rows by what is in the data."""
    if name in _PICKING:
        return True
    if name in _ALONG:
        if kwargs.get("dim", args[1] if len(args) > 1 else 0) != 0:
            return False
        return name not in _LOOKUPS or not _is_constant(args[0])
    if name not in ("__getitem__", "__setitem__"):
        return False
    first = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
    if not isinstance(first, Node) or not first.of_data:
        return False
    # A table that is no data, looked up by number, has a row for each number, in their order.
    looked_up = name == "__getitem__" and first.value.dtype not in (torch.bool, torch.uint8)
    return not (looked_up and _is_constant(args[0]))


def _is_constant(operand: Any) -> bool:
    return isinstance(operand, Node) and not operand.of_data


def call_again(node: Node, values: Mapping[int, Tensor]) -> Tensor:
    """The node's function with other values in place of some of its inputs, by their positions in
    ``node.inputs``."""
    assert node.func is not None
    numbers = iter(range(len(node.inputs)))
    args = _filled(node.args, numbers, node.inputs, values)
    kwargs = _filled(dict(node.kwargs), numbers, node.inputs, values)
    output = node.func(*args, **kwargs)
    return output if node.output is None else output[node.output]


def _filled(
    value: Any, numbers: Iterator[int], inputs: Sequence[Node], values: Mapping[int, Tensor]
) -> Any:
    if isinstance(value, Node):
        number = next(numbers)
        return values.get(number, inputs[number].value)
    if isinstance(value, (tuple, list)):
        return _like(value, [_filled(part, numbers, inputs, values) for part in value])
    if isinstance(value, dict):
        return {key: _filled(part, numbers, inputs, values) for key, part in value.items()}
    return value


def _exchanged(value: Any, given: Iterator[Node]) -> Any:
    """A structure of arguments with other nodes in it, one after another."""
    if isinstance(value, Node):
        return next(given)
    if isinstance(value, (tuple, list)):
        return _like(value, [_exchanged(part, given) for part in value])
    if isinstance(value, dict):
        return {key: _exchanged(part, given) for key, part in value.items()}
    return value


def _like(value: Sequence[Any], parts: list[Any]) -> Sequence[Any]:
    """A list or tuple: x[[0, 1]] and x[(0, 1)] are different things."""
    return parts if isinstance(value, list) else tuple(parts)


def _plain_name(name: str) -> str:
    """``add`` for ``__add__``, ``__iadd__``, ``add_``; ``radd`` for ``__radd__``."""
    plain = name.strip("_")
    if name in _IN_PLACE and plain.startswith("i"):
        plain = plain[1:]
    return {"truediv": "div", "true_divide": "div", "divide": "div", "multiply": "mul",
            "subtract": "sub", "negative": "neg", "rtruediv": "rdiv"}.get(plain, plain)  # fmt: skip
