"""Which torch calls may put examples at other places than their own.

Where rows are depends on the shapes alone as long as none of these is called: an index, a sort, a
mask, examples taken one by one, values read into Python. Otherwise it may depend on the data, and
is to be observed in every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torch.utils import _pytree as pytree

_ALWAYS = frozenset(
    "index_select gather take take_along_dim masked_select masked_scatter masked_scatter_ "  # noqa: SIM905
    "index_add index_add_ index_copy index_copy_ index_put index_put_ scatter scatter_ "
    "scatter_add scatter_add_ scatter_reduce scatter_reduce_ nonzero argwhere sort argsort msort "
    "unique unique_consecutive repeat_interleave flip flipud fliplr roll rot90 "
    "_pack_padded_sequence _pad_packed_sequence segment_reduce tolist item numpy __array__ "
    "__int__ __index__ __float__ embedding_bag".split()
)
_APART = frozenset(("unbind", "__iter__"))
_PRODUCTS = frozenset(("matmul", "mm", "__matmul__", "__rmatmul__", "tensordot", "einsum"))
_INDEXED = frozenset(("__getitem__", "__setitem__"))


_NAMES = _ALWAYS | _APART | _PRODUCTS | _INDEXED


def may_move(
    func: Callable[..., object],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    batch: int,
) -> bool:
    """Whether a call may move some of ``batch`` examples along an axis that may hold them."""
    name = func.__name__
    if name not in _NAMES:
        return False
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if name in _INDEXED:
        return _indexed(given[0], args[1], batch)
    if name in _ALWAYS:
        return any(size % batch == 0 for tensor in given for size in tensor.shape)
    if name in _PRODUCTS:
        return _contracts(given, args[0] if name == "einsum" else None, batch)
    axis = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    return axis in (0, -given[0].dim()) and _holds(given[0], batch)


def _contracts(tensors: Sequence[Tensor], equation: object, batch: int) -> bool:
    """Whether a product sums over an axis that may hold the examples, as one with a permutation
    matrix does."""
    if not isinstance(equation, str):
        last = tensors[-1]  # [summed over, ...] where it has no axes before
        return len(tensors) < 2 or (
            last.dim() == 2 and _holds(last, batch) and not isinstance(last, nn.Parameter)
        )
    inputs, _, output = equation.replace(" ", "").partition("->")
    if "." in equation or not output:
        return True
    return any(
        _holds(tensor, batch) and letters[:1] not in output
        for letters, tensor in zip(inputs.split(","), tensors, strict=False)
    )


def _holds(tensor: Tensor, batch: int) -> bool:
    """Whether the first axis may hold the examples."""
    return tensor.dim() > 0 and tensor.shape[0] % batch == 0


def _indexed(tensor: Tensor, index: object, batch: int) -> bool:
    parts: Sequence[object] = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, (Tensor, list)) or hasattr(part, "__array__") for part in parts):
        return any(size % batch == 0 for size in tensor.shape)
    # One example after the other, by a number that Python has.
    return isinstance(parts[0], int) and _holds(tensor, batch) if parts else False


def opaque(batch: object, count: int) -> bool:
    """Whether a batch holds anything but tensors [count, ...] and single numbers."""
    for leaf in pytree.tree_leaves(batch):
        if not isinstance(leaf, Tensor):
            return True
        if leaf.is_nested or (leaf.dim() and leaf.shape[0] != count):
            return True
    return False
