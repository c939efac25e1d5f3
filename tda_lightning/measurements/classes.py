r"""Measurements of classes and tokens: probabilities, logits, margins, contrasts, rewards.

With :math:`z_{tc}` the logits of a query at position t (a classifier has one position), :math:`p =
softmax(z)`, c_t the label or a chosen class and the positions that were chosen:

================ ======================================== ======================
Loss             mean over t of -log p_t(c_t)             smaller is better
LogProbability   log P = sum over t of log p_t(c_t)       larger is better
Probability      P, of all these tokens together          larger is better
Margin           log P / (1 - P)                          larger is better
Logit            sum over t of z_t(c_t)                   larger is better
Contrast         sum over t of p_t(a) - p_t(b), or of     larger is better
                 z_t(a) - z_t(b)
Reward           r_q log P, the policy gradient's         larger is better
================ ======================================== ======================

The measurement is minus the quantity where larger is better: a positive score is how much the
quantity is predicted to *fall* if the example is removed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tda_lightning.measurements.base import Measurement, function_name, function_of
from tda_lightning.measurements.outputs import (
    ClassOutputs,
    NoClassesError,
    class_outputs,
    given_outputs,
)
from tda_lightning.measurements.positions import Positions
from tda_lightning.tasks import AttributionTask
from tda_lightning.tasks.batches import Batch
from tda_lightning.tasks.loss_calls import inside_transform

Chosen: TypeAlias = "int | Sequence[int] | None"  # of all queries, or of each its own


@dataclass(kw_only=True)
class OfPositions(Measurement):
    """A function of numbers at the positions of a query.

    Attributes:
        positions: which terms of the query's loss (tokens), as in ``Scores.by_token``: a number, a
            list, or such a list for each query. Negative ones count from the last that counts.
            None: all that count.
        span: or [start, stop], or one for each query.
        outputs: a function (module, batch) -> logits [batch, classes] or [batch, position,
            classes], or its full name, for queries of another structure than training examples.
            None: the logits that the task's loss is made of.
    """

    positions: Any = None
    span: Any = None
    outputs: Callable[..., Any] | str | None = None

    def __post_init__(self) -> None:
        self._positions = Positions.of(self.positions, self.span)
        self._function = None if self.outputs is None else function_of(self.outputs, "outputs")
        self.takes_loss = self._function is None

    @abstractmethod
    def values(self, found: ClassOutputs, queries: Tensor) -> Tensor:
        """A number for each position, [batch, position]."""

    def together(self, values: Tensor, chosen: Tensor, queries: Tensor) -> Tensor:
        """The quantity of each query, [batch], from the values of the chosen positions; their
        sum unless another is defined.

        Args:
            values: [batch, position], 0 where not chosen.
            chosen: bool [batch, position].
        """
        return values.sum(1)

    def measure(
        self, task: AttributionTask, module: nn.Module, batch: Batch, queries: Tensor
    ) -> Tensor:
        values, chosen = self._chosen_values(task, module, batch, queries)
        return self.sign * self.together(values, chosen, queries)

    def terms(
        self, task: AttributionTask, module: nn.Module, batch: Batch, queries: Tensor
    ) -> tuple[Tensor, Tensor]:
        values, chosen = self._chosen_values(task, module, batch, queries)
        slopes = torch.func.grad(lambda own: self.together(own, chosen, queries).sum())(
            values.detach()
        )
        return self.sign * slopes.detach() * values, chosen

    def check(self, num_query: int) -> None:
        super().check(num_query)
        own = 1 if self._positions is None else self._positions.count
        if own not in (1, num_query):
            raise ValueError(
                f"positions or span are given for {own} queries, and there are {num_query}: give "
                "them for all alike, or for each query."
            )

    @property
    def each_own(self) -> list[str]:
        several = self._positions is not None and self._positions.count > 1
        return [*super().each_own, *(["positions"] if several else [])]

    def found(self, task: AttributionTask, module: nn.Module, batch: Batch, count: int) -> Any:
        """The logits of a batch."""
        if self._function is None:
            return class_outputs(task, module, batch)
        return given_outputs(self._function, module, batch, count)

    def _chosen_values(
        self, task: AttributionTask, module: nn.Module, batch: Batch, queries: Tensor
    ) -> tuple[Tensor, Tensor]:
        found: ClassOutputs = self.found(task, module, batch, len(queries))
        positions = self._positions
        chosen = found.counted if positions is None else positions.mask(found, queries)
        if not inside_transform():
            self._require_known(found, chosen, queries)
        return self.values(found, queries).where(chosen, 0), chosen

    def _require_known(self, found: ClassOutputs, chosen: Tensor, queries: Tensor) -> None:
        if not bool((any_chosen := chosen.any(1)).all()):
            query = int(queries[int((~any_chosen).nonzero()[0])])
            raise ValueError(
                f"No position of query {query} counts: all its labels are ignored. Leave it out, "
                "or choose positions and a target."
            )

    @property
    def where(self) -> str:
        """The positions in words."""
        words = "" if self._positions is None else f" {self._positions.in_words()}"
        given = "" if self.outputs is None else f" by {function_name(self.outputs)}"
        return words + given


def class_index(chosen: Chosen, queries: Tensor, found: ClassOutputs) -> Tensor:
    """The class that is asked about at each position, int64 [batch, position]."""
    if chosen is None:
        assert found.labels is not None
        return found.labels
    of_query = torch.as_tensor(chosen, device=queries.device)
    of_query = of_query.expand(len(queries)) if of_query.dim() == 0 else of_query[queries]
    return of_query[:, None].expand(found.logits.shape[:2])


@dataclass
class OfTarget(OfPositions):
    """A measurement of one class or token.

    Attributes:
        target: the class or token; a list has one for each query. None: the label.
    """

    target: Chosen = None
    per_query: ClassVar[tuple[str, ...]] = ("target",)

    def picked(self, values: Tensor, found: ClassOutputs, queries: Tensor) -> Tensor:
        """``values`` [batch, position, class] of the target."""
        index = class_index(self.target, queries, found)
        return values.gather(2, index[..., None]).squeeze(2)

    def _require_known(self, found: ClassOutputs, chosen: Tensor, queries: Tensor) -> None:
        super()._require_known(found, chosen, queries)
        self.require_class("target", self.target, found)
        if self.target is None:
            if found.labels is None:
                raise NoClassesError(
                    "The queries have no labels (or soft ones): name the class or token with "
                    "target=."
                )
            if bool((chosen & ~found.counted).any()):
                row, place = (chosen & ~found.counted).nonzero()[0].tolist()
                raise ValueError(
                    f"Position {place} of query {int(queries[row])} has no label that counts. Name "
                    "a target, or choose positions that count."
                )
        elif self._positions is None and bool((chosen.sum(1) > 1).any()):
            raise ValueError(
                f"target={self.target!r} names one class, and a query has "
                f"{int(chosen.sum(1).max())} positions: say which with positions= (-1 is the last)."
            )

    def require_class(self, name: str, chosen: Chosen, found: ClassOutputs) -> None:
        """Refuse a class that the model does not have."""
        numbers = [] if chosen is None else [chosen] if isinstance(chosen, int) else list(chosen)
        classes = found.logits.shape[-1]
        for number in numbers:
            if not 0 <= number < classes:
                raise ValueError(
                    f"{name} must be a class or token of the model, 0 to {classes - 1}; got "
                    f"{number}."
                )

    @property
    def what(self) -> str:
        """The target in words."""
        if self.target is None:
            return "the label" if self._positions is None else "the labels"
        return f"class {self.target}" if isinstance(self.target, int) else "each query's target"


@dataclass
class Loss(OfTarget):
    """Mean cross entropy of the labels, or of a target, at some positions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sign = 1

    @property
    def quantity(self) -> str:
        return f"the cross entropy of {self.what}{self.where}"

    def values(self, found: ClassOutputs, queries: Tensor) -> Tensor:
        return -self.picked(found.logits.log_softmax(-1), found, queries)

    def together(self, values: Tensor, chosen: Tensor, queries: Tensor) -> Tensor:
        return values.sum(1) / chosen.sum(1)


@dataclass
class LogProbability(OfTarget):
    """Log-probability of the labels, or of a target; of several tokens together."""

    @property
    def quantity(self) -> str:
        return f"the log-probability of {self.what}{self.where}"

    def values(self, found: ClassOutputs, queries: Tensor) -> Tensor:
        return self.picked(found.logits.log_softmax(-1), found, queries)


@dataclass
class Probability(LogProbability):
    """Probability of the labels, or of a target; of several tokens together.

    Its gradient vanishes where the model is sure: ``Margin`` or ``LogProbability`` do not.
    """

    @property
    def quantity(self) -> str:
        return f"the probability of {self.what}{self.where}"

    def together(self, values: Tensor, chosen: Tensor, queries: Tensor) -> Tensor:
        return values.sum(1).exp()


@dataclass
class Margin(OfTarget):
    """Log-odds of the labels, or of a target: log P / (1 - P), of several tokens together."""

    @property
    def quantity(self) -> str:
        return f"the log-odds of {self.what}{self.where}"

    def values(self, found: ClassOutputs, queries: Tensor) -> Tensor:
        index = class_index(self.target, queries, found)[..., None]
        own = found.logits.gather(2, index).squeeze(2)
        classes = torch.arange(found.logits.shape[-1], device=index.device)
        # From the logits: 1 - p has lost its digits where the model is sure.
        return own - found.logits.masked_fill(classes == index, -torch.inf).logsumexp(2)

    def together(self, values: Tensor, chosen: Tensor, queries: Tensor) -> Tensor:
        single = chosen.sum(1) == 1
        total = F.logsigmoid(values).where(chosen, 0).sum(1)
        several = total.where(~single, -1.0)
        several = several - (-torch.expm1(several)).log()
        return torch.where(single, values.sum(1), several)


@dataclass
class Logit(OfTarget):
    """Logit of the labels, or of a target; of several positions, their sum."""

    @property
    def quantity(self) -> str:
        return f"the logit of {self.what}{self.where}"

    def values(self, found: ClassOutputs, queries: Tensor) -> Tensor:
        own = self.picked(found.logits, found, queries)
        return 2 * own if found.bits else own


@dataclass
class Contrast(OfTarget):
    """Why this and not that: the target's probability minus the foil's, or their difference in
    logits, which is that of their log-probabilities.

    Attributes:
        foil: the class or token that the target is compared with; a list has one for each query.
        of: ``probability`` or ``logit``.
    """

    foil: Chosen = None
    of: Literal["probability", "logit"] = "probability"
    per_query: ClassVar[tuple[str, ...]] = ("target", "foil")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.foil is None:
            raise ValueError("Contrast compares the target with a foil: give foil=, a class.")
        if self.of not in ("probability", "logit"):
            raise ValueError(f"of must be 'probability' or 'logit', got {self.of!r}.")

    @property
    def quantity(self) -> str:
        name = "logit" if self.of == "logit" else "probability"
        foil = f"class {self.foil}" if isinstance(self.foil, int) else "each query's foil"
        return f"the {name} of {self.what} minus that of {foil}{self.where}"

    def values(self, found: ClassOutputs, queries: Tensor) -> Tensor:
        values = found.logits if self.of == "logit" else found.logits.softmax(-1)
        foil = class_index(self.foil, queries, found)[..., None]
        return self.picked(values, found, queries) - values.gather(2, foil).squeeze(2)

    def _require_known(self, found: ClassOutputs, chosen: Tensor, queries: Tensor) -> None:
        super()._require_known(found, chosen, queries)
        self.require_class("foil", self.foil, found)
        target = class_index(self.target, queries, found)
        same = (target == class_index(self.foil, queries, found)) & chosen
        if bool(same.any()):
            row, place = same.nonzero()[0].tolist()
            raise ValueError(
                f"The foil of query {int(queries[row])} is its target, {int(target[row, place])}: "
                "their difference is 0 whatever the model does. Give another foil."
            )


@dataclass
class Reward(OfPositions):
    r"""A policy gradient: each query is an output of the model that was given a reward.

    .. math::
        m_q = -(r_q - b) \sum_t \log p_t(y_{qt})

    The mean over queries of the scores is then the predicted fall of the expected reward (Williams
    1992, REINFORCE), and a positive score says that the example pushes the model towards what was
    rewarded, or away from what was punished.

    Attributes:
        rewards: one for each query, or the key of the batch that holds them.
        baseline: b, taken off every reward.
    """

    rewards: Any = None
    baseline: float = 0.0
    per_query: ClassVar[tuple[str, ...]] = ("rewards",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rewards is None:
            raise ValueError(
                "Reward needs rewards=: a list with one for each query, or the key of the batch "
                "that holds them."
            )

    @property
    def quantity(self) -> str:
        return f"the log-probability of the labels{self.where} times the query's reward"

    def measure(
        self, task: AttributionTask, module: nn.Module, batch: Batch, queries: Tensor
    ) -> Tensor:
        measured = super().measure(task, module, batch, queries)
        return self._rewards(batch, queries).to(measured) * measured

    def terms(
        self, task: AttributionTask, module: nn.Module, batch: Batch, queries: Tensor
    ) -> tuple[Tensor, Tensor]:
        terms, chosen = super().terms(task, module, batch, queries)
        return self._rewards(batch, queries).to(terms)[:, None] * terms, chosen

    def values(self, found: ClassOutputs, queries: Tensor) -> Tensor:
        if found.labels is None:
            raise ValueError("Reward needs labels: the tokens that were rewarded.")
        return found.logits.log_softmax(-1).gather(2, found.labels[..., None]).squeeze(2)

    def _rewards(self, batch: Batch, queries: Tensor) -> Tensor:
        if not isinstance(self.rewards, str):
            given = torch.as_tensor(self.rewards, device=queries.device)[queries]
        elif hasattr(batch, "keys") and self.rewards in batch:  # type: ignore[operator]
            given = torch.as_tensor(batch[self.rewards], device=queries.device)  # type: ignore[index]
        else:
            raise ValueError(
                f"The batches of the queries have no key {self.rewards!r}: give rewards as a list "
                "with one for each query."
            )
        return given.reshape(len(queries)).double() - self.baseline
