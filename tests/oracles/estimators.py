"""TracIn, influence functions and SOURCE with dense matrices.

Gradients come as plain matrices ([examples, parameters], by checkpoint where needed) and curvature
as one dense matrix per segment, so that any curvature (exact, EK-FAC, ...) can be judged. Scores
are in the project's sign and unit: the change of m_q predicted when example n is removed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tda_lightning.records.trajectory import Checkpoint, Segment, Trajectory
from tests.oracles.draws import drawn_weights

# Weights of the checkpoints that stand for the gradients at row t, by checkpoint step.
Weights = Callable[[int], Mapping[int, float]]


def spread(trajectory: Trajectory, per_group: Tensor) -> Tensor:
    """Values of parameter groups [..., group] repeated for every parameter, [..., parameters]."""
    groups = torch.tensor(
        [
            fact.group
            for fact in trajectory.facts.parameters.values()
            for _ in range(torch.Size(fact.shape).numel())
        ]
    )
    return per_group[..., groups]


def effective_rates(trajectory: Trajectory) -> Tensor:
    """What each step adds to eta K, [steps, parameters]: momentum multiplies the rate, and
    Adagrad's falls."""
    steps = trajectory.steps
    rates, hyper = steps.learning_rate.clone(), steps.hyperparameters
    if trajectory.facts.optimizer == "SGD":
        momentum, dampening = hyper["momentum"], hyper["dampening"]
        # torch.optim.SGD without momentum has no buffer and so no dampening.
        rates = rates * torch.where(momentum == 0, 1.0, (1 - dampening) / (1 - momentum))
    if trajectory.facts.optimizer == "RMSprop":
        rates = rates / (1 - hyper["momentum"])
    if trajectory.facts.optimizer == "Adagrad":
        rates = rates / (1 + torch.arange(len(steps))[:, None] * hyper["lr_decay"])
    return spread(trajectory, rates)


def preconditioner(trajectory: Trajectory, checkpoints: Sequence[Checkpoint]) -> Tensor:
    r"""Mean over checkpoints of :math:`1 / (\sqrt{\hat v} + \epsilon)`, [parameters].

    It is 1 for SGD, and 0 at a checkpoint where v = 0: nothing has moved that coordinate yet.
    """
    kind, hyper = trajectory.facts.optimizer, trajectory.steps.hyperparameters
    if kind == "SGD":
        return torch.ones_like(spread(trajectory, trajectory.steps.learning_rate[0]))
    total = 0
    for checkpoint in checkpoints:
        parts = []
        for name, fact in trajectory.facts.parameters.items():
            state = checkpoint.optimizer[name]
            own = {key: float(v[checkpoint.step - 1, fact.group]) for key, v in hyper.items()}
            if kind == "RMSprop":
                second = state["square_avg"]
                if own["centered"]:
                    second = second - state["grad_avg"] ** 2
            elif kind == "Adagrad":
                second = state["sum"]
            else:
                second = state["exp_avg_sq"] / (1 - own["beta2"] ** float(state["step"]))
            second = second.double().reshape(-1)
            parts.append(torch.where(second == 0, 0.0, 1 / (second.sqrt() + own["eps"])))
        total = total + torch.cat(parts)
    return total / len(checkpoints)


def tracin(
    trajectory: Trajectory, train: Mapping[int, Tensor], query: Mapping[int, Tensor]
) -> Tensor:
    r"""TracIn by checkpoint, [checkpoint, query, train]; their sum is the score.

    .. math::
        \frac1N \sum_c w_c v_{cn} \nabla m_q(\theta_c) \cdot \nabla \ell_n(\theta_c),
        \quad w_c = \sum_{c' < t \le c} \eta_t \frac{1 - \tau}{1 - \mu}

    Args:
        train: gradients [train, parameters] at each checkpoint to use.
        query: gradients [query, parameters] at the same checkpoints.
    """
    rates = effective_rates(trajectory)
    steps, scores = sorted(train), []
    for before, step in zip([0, *steps], steps, strict=False):
        weight = rates[before:step].sum(0)
        drawn = drawn_weights(trajectory, before, step, len(train[step]))
        scores.append(torch.einsum("qp,p,np,n->qn", query[step], weight, train[step], drawn))
    return torch.stack(scores) / len(train[steps[0]])


def influence(
    curvature: Tensor,
    weight_decay: float | Tensor,
    damping: float | Tensor,
    train: Tensor,
    query: Tensor,
) -> Tensor:
    r""":math:`\frac1N \nabla m_q^T (H + (\lambda + \text{damping}) I)^{-1} \nabla \ell_n`.

    Args:
        curvature: H at the last checkpoint, [parameters, parameters].
        weight_decay: a number, or one per parameter. ``damping`` likewise.
        train: [train, parameters]. ``query``: [query, parameters].
    """
    added = torch.zeros(len(curvature)) + weight_decay + damping
    return query @ torch.linalg.solve(curvature + torch.diag(added), train.T) / len(train)


def source_average(
    trajectory: Trajectory,
    segments: Sequence[Segment],
    curvature: Sequence[Tensor],
    train: Mapping[int, Tensor],
    query: Tensor,
) -> Tensor:
    r"""SOURCE (Bae et al. 2024) by segment, [segment, query, train]; their sum is the score.

    With :math:`M = \sum_t \eta_t (P H + \Lambda)` over the segment's steps,

    .. math::
        S = e^{-M}, \quad r_n = \int_0^1 e^{-M s} ds \; \sum_t \eta_t P g_n
          = (I - e^{-M}) M^{-1} \sum_t \eta_t P g_n,

    where coupled weight decay puts :math:`\Lambda = P \lambda`, decoupled decay
    :math:`\Lambda = \lambda`. Both come out of one exponential of the matrix [[-M, I], [0, 0]]
    (Van Loan 1978, Computing integrals involving the matrix exponential).

    Args:
        curvature: mean curvature H of each segment.
        train: gradients [train, parameters] at every checkpoint of the segments.
        query: measurement gradients at the last checkpoint, [query, parameters].
    """
    rates = effective_rates(trajectory)
    decay = spread(trajectory, trajectory.steps.hyperparameters["weight_decay"])
    carried, scores = query, []
    for segment, matrix in reversed(list(zip(segments, curvature, strict=True))):
        moments = [trajectory.checkpoints[step] for step in segment.checkpoints]
        scale = preconditioner(trajectory, moments)
        moved = rates[segment.rows].sum(0)
        decayed = (rates * decay)[segment.rows].sum(0)
        if trajectory.facts.optimizer != "AdamW":
            decayed = scale * decayed
        exponent = (moved * scale)[:, None] * matrix + torch.diag(decayed)
        size = len(exponent)
        augmented = torch.zeros(2 * size, 2 * size, dtype=exponent.dtype)
        augmented[:size, :size] = -exponent
        augmented[:size, size:] = torch.eye(size)
        both = torch.linalg.matrix_exp(augmented)
        gradients = torch.stack([train[step] for step in segment.checkpoints]).mean(0)
        response = both[:size, size:] @ ((moved * scale)[:, None] * gradients.T)
        drawn = drawn_weights(trajectory, segment.start, segment.stop, len(gradients))
        scores.append(carried @ response * drawn)
        carried = carried @ both[:size, :size]
    return torch.stack(scores[::-1]) / len(train[segments[0].checkpoints[0]])


def nearest(steps: Sequence[int]) -> Weights:
    """Row t uses weights after t steps: the checkpoint nearest to t, the earlier of two equals."""
    return lambda row: {min(sorted(steps), key=lambda step: abs(step - row)): 1.0}


def interpolated(steps: Sequence[int]) -> Weights:
    """Straight line between the two checkpoints around row t, constant outside of them."""
    ordered = sorted(steps)

    def weights(row: int) -> dict[int, float]:
        before = [step for step in ordered if step <= row]
        after = [step for step in ordered if step >= row]
        if not before or not after or before[-1] == after[0]:
            return {(before[-1] if before else after[0]): 1.0}
        left, right = before[-1], after[0]
        part = (row - left) / (right - left)
        return {left: 1 - part, right: part}

    return weights


def source_recorded(
    trajectory: Trajectory,
    segments: Sequence[Segment],
    curvature: Sequence[Tensor],
    train: Mapping[int, Tensor],
    query: Tensor,
    weights: Weights | None = None,
    shares: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """SOURCE on the recorded order for SGD by segment, [segment, query, train].

    The adjoint recursion of docs/methods.md, "Exact unrolling", with one curvature matrix for each
    segment in place of every step's Hessian, and the checkpoints' gradients for every step's.

    Args:
        curvature: mean curvature H of each segment.
        train: gradients [train, parameters] by checkpoint.
        query: measurement gradients at the last checkpoint, [query, parameters].
        weights: which checkpoints stand for a row's gradients; the nearest of ``train`` if None.
        shares: each example's share [train] of a row's gradient; the recorded ones if None, and
            1/N everywhere for SOURCE's even use with the momentum's exact warm-up.
    """
    steps, hyper = trajectory.steps, trajectory.steps.hyperparameters
    count = len(next(iter(train.values())))
    weights = nearest(list(train)) if weights is None else weights
    shares = (lambda row: recorded_shares(trajectory, row, count)) if shares is None else shares
    adjoint, buffer = query.clone(), torch.zeros_like(query)
    scores = torch.zeros(len(segments), len(query), count, dtype=query.dtype)
    for number in reversed(range(len(segments))):
        segment = segments[number]
        for row in reversed(range(segment.start, segment.stop)):
            rate = spread(trajectory, steps.learning_rate[row])
            momentum = spread(trajectory, hyper["momentum"][row])
            nesterov = spread(trajectory, hyper["nesterov"][row]) != 0
            # The first step fills the buffer undampened; without momentum there is no buffer.
            dampening = spread(trajectory, hyper["dampening"][row]) * (momentum > 0) * (row > 0)
            decay = spread(trajectory, hyper["weight_decay"][row])
            buffer = buffer - rate * torch.where(nesterov, momentum, 1.0) * adjoint
            reach = (1 - dampening) * buffer - torch.where(nesterov, rate, 0.0) * adjoint
            gradients = sum(part * train[step] for step, part in weights(row).items())
            scores[number] -= reach @ gradients.T * shares(row)
            adjoint = adjoint + decay * reach + reach @ curvature[number]
            buffer = momentum * buffer
    return scores


def recorded_shares(trajectory: Trajectory, row: int, count: int) -> Tensor:
    """Share of each example in the gradient of row ``row``, [train]."""
    shares = torch.zeros(count, dtype=torch.float64)
    for indices in trajectory.steps.batches(row):
        for index in indices.tolist():
            shares[index] += 1 / (len(indices) * int(trajectory.steps.accumulation[row]))
    return shares
