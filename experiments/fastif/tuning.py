"""Fine-tuning: (c) does it correct errors, (d) does it move a prediction as the score says?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.fastif.kept import crossed, interval
from experiments.fastif.recorded import NUM_TRAIN, Run
from tda_lightning import Scores
from tda_lightning.evaluation.linear_datamodeling import rank_correlation

K = 1000
# (c)
ANCHORS, CHOSEN, STEPS = 16, 32, 5
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
METHODS = ("helpful", "balanced", "harmful", "nearest", "random", "anchors")
# (d)
SIMULATED, EACH, RATE = 16, 3, 0.01
SIMULATED_STEPS = (1, 5)


def correct(run: Run, fast: Scores) -> dict[str, Any]:
    """Accuracy on other pairs before and after a few steps on training pairs, which are chosen for
    groups of HANS-like pairs: those that the model gets wrong, or any, as the paper does."""
    run.restore()
    inputs, targets = run.queries.tensors
    labels = torch.tensor([int(run.train[n][1]) for n in range(fast.num_train)])
    said = outputs_of(run.module, inputs[run.hans]).argmax(1)
    wrong = (said != targets[run.hans]).nonzero().squeeze(1) + run.hans.start
    any_pair = torch.arange(run.hans.start, run.hans.stop)
    own = torch.Generator().manual_seed(0)
    groups = {"wrong": grouped(wrong, own)}
    groups["any"] = grouped(any_pair, own)[: len(groups["wrong"])]
    before = {name: _right(run.module, *pairs) for name, pairs in run.test.items()}
    found: dict[str, Any] = {
        "before": {name: interval(values) for name, values in before.items()},
        "says_entailment": _mean(outputs_of(run.module, run.test["hans"][0]).argmax(1) == 0),
        "wrong": len(wrong),
        "groups": len(groups["wrong"]),
        "rows": [],
    }
    for kind, listed in groups.items():
        for method in METHODS:
            chosen = [chosen_by(method, fast, anchors, own, labels) for anchors in listed]
            tuned = [_tuned(run, *pairs) for pairs in zip(listed, chosen, strict=True)]
            gains = {
                name: torch.stack([one["right"][name] for one in tuned]) - values  # by group, rate
                for name, values in before.items()
            }
            together = torch.cat([torch.cat(pairs) for pairs in chosen])
            found["rows"].append(
                {
                    "anchors": kind,
                    "method": method,
                    "contradicting": _mean(together >= NUM_TRAIN),
                    "entailment": _mean(labels[together] == 0),
                    "chosen": chosen_rate(gains),
                    "rates": [
                        {
                            "rate": rate,
                            "gain": {name: crossed(gain[:, n]) for name, gain in gains.items()},
                            "anchors_right": _average(one["anchors"][n] for one in tuned),
                            "says_entailment": _average(one["says"][n] for one in tuned),
                        }
                        for n, rate in enumerate(RATES)
                    ],
                }
            )
    run.restore()
    return found


def grouped(places: Tensor, own: torch.Generator) -> list[Tensor]:
    """In random order, as many whole groups as there are."""
    order = places[torch.randperm(len(places), generator=own)]
    return [group for group in order.split(ANCHORS) if len(group) == ANCHORS]


def _tuned(run: Run, anchors: Tensor, chosen: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Right answers of all test pairs by set, [rate, pair]; and by rate the share of right anchors
    and of HANS-like test pairs that the model calls entailed."""
    asked = run.queries[anchors]
    up, down = chosen
    right: dict[str, list[Tensor]] = {name: [] for name in run.test}
    found: dict[str, Any] = {"anchors": [], "says": []}
    for rate in RATES:
        run.restore()
        # Without training pairs to learn from, the anchors themselves.
        descent = _pairs(run, up) if len(up) or len(down) else asked
        descend(run.module, descent, _pairs(run, down), rate, STEPS)
        for name, (inputs, targets) in run.test.items():
            said = outputs_of(run.module, inputs).argmax(1)
            right[name].append((said == targets).double())
            if name == "hans":
                found["says"].append(_mean(said == 0))
        found["anchors"].append(float(_right(run.module, *asked).mean()))
    return found | {"right": {name: torch.stack(values) for name, values in right.items()}}


def chosen_rate(gains: dict[str, Tensor]) -> dict[str, Any]:
    """The rate with the largest gain on every other HANS-like test pair, the least of equal ones;
    and the gains [group, rate, pair] on the rest of the pairs."""
    best = int(gains["hans"][:, :, ::2].mean((0, 2)).argmax())
    other = {name: crossed(gain[:, best, 1::2]) for name, gain in gains.items()}
    return {"rate": RATES[best], "gain": other}


def chosen_by(
    method: str, fast: Scores, anchors: Tensor, own: torch.Generator, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Training pairs to descend on, and to ascend on."""
    assert fast.candidates is not None
    none = torch.zeros(0, dtype=torch.int64)
    candidates = fast.candidates[anchors, :K]
    scored = torch.zeros(len(anchors), fast.num_train, dtype=torch.float64)
    values = fast.values[anchors].double()
    total = scored.scatter(1, candidates, values.gather(1, candidates)).mean(0)
    if method == "helpful":
        return total.topk(CHOSEN).indices, none
    if method == "balanced":  # as many of each label
        of_each = [total.where(labels == label, -torch.inf) for label in (0, 1)]
        return torch.cat([part.topk(CHOSEN // 2).indices for part in of_each]), none
    if method == "harmful":
        return none, (-total).topk(CHOSEN).indices
    if method == "nearest":
        places = torch.arange(fast.num_train, dtype=torch.float64).expand(len(anchors), -1)
        ranks = torch.zeros(len(anchors), fast.num_train, dtype=torch.float64)
        ranks.scatter_(1, fast.candidates[anchors], places)
        return (-ranks.mean(0)).topk(CHOSEN).indices, none
    if method == "random":
        return torch.randperm(fast.num_train, generator=own)[:CHOSEN], none
    return none, none


def simulate(run: Run, fast: Scores) -> dict[str, Any]:
    """The loss of a query after steps on a single pair, by the sign of the pair's score."""
    assert fast.candidates is not None
    run.restore()
    inputs, targets = run.queries.tensors
    own = torch.Generator().manual_seed(0)
    kinds = ("helpful", "harmful", "random", "nearest")
    moved = torch.zeros(SIMULATED, len(kinds), EACH, len(SIMULATED_STEPS), dtype=torch.float64)
    scores = torch.zeros(SIMULATED, len(kinds), EACH, dtype=torch.float64)
    for query in range(SIMULATED):
        candidates = fast.candidates[query, :K]
        values = fast.values[query, candidates].double()
        picks = [
            candidates[values.topk(EACH).indices],
            candidates[(-values).topk(EACH).indices],
            candidates[torch.randperm(K, generator=own)[:EACH]],
            candidates[:EACH],
        ]
        asked = inputs[query : query + 1], targets[query : query + 1]
        run.restore()
        before = _loss(run.module, *asked)
        for kind, chosen in enumerate(picks):
            for place, example in enumerate(chosen.tolist()):
                run.restore()
                pair, done = _pairs(run, torch.tensor([example])), 0
                scores[query, kind, place] = fast.values[query, example]
                for number, steps in enumerate(SIMULATED_STEPS):
                    descend(run.module, pair, None, RATE, steps - done)
                    done = steps
                    moved[query, kind, place, number] = _loss(run.module, *asked) - before
    run.restore()
    rows = []
    for number, steps in enumerate(SIMULATED_STEPS):
        change = moved[..., number]
        agree = (change.sign() == -scores.sign()).double()
        rows.append(
            {
                "steps": steps,
                "change": {k: interval(change[:, n].mean(1)) for n, k in enumerate(kinds)},
                "agrees": {k: interval(agree[:, n].mean(1)) for n, k in enumerate(kinds)},
                "spearman": interval(rank_correlation(scores.flatten(1), -change.flatten(1))),
            }
        )
    return {"num_queries": SIMULATED, "each": EACH, "rate": RATE, "rows": rows}


def descend(
    module: nn.Module,
    down: tuple[Tensor, Tensor] | None,
    up: tuple[Tensor, Tensor] | None,
    rate: float,
    steps: int,
) -> None:
    """Steps of gradient descent on the mean loss of the pairs ``down`` less that of ``up``."""
    optimizer = torch.optim.SGD(module.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.zeros(())
        for sign, pairs in ((1, down), (-1, up)):
            if pairs is not None and len(pairs[1]):
                loss = loss + sign * F.cross_entropy(module(pairs[0]), pairs[1])
        loss.backward()
        optimizer.step()


def outputs_of(module: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([module(part) for part in inputs.split(256)])


def _right(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs_of(module, inputs).argmax(1) == targets).double()


def _average(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _mean(flags: Tensor) -> float:
    return float(flags.double().mean()) if len(flags) else 0.0


def _loss(module: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    return float(F.cross_entropy(outputs_of(module, inputs), targets))


def _pairs(run: Run, places: Tensor) -> tuple[Tensor, Tensor] | None:
    if not len(places):
        return None
    found = [run.train[n] for n in places.tolist()]
    return torch.stack([f[0] for f in found]), torch.stack([torch.as_tensor(f[1]) for f in found])
