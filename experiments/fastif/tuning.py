"""Fine-tuning: (c) does it correct errors, (d) does it move a prediction as the score says?"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.fastif.kept import interval
from experiments.fastif.recorded import NUM_TRAIN, Run
from tda_lightning import Scores
from tda_lightning.evaluation.lds import rank_correlation

K = 1000
# (c)
GROUPS, ANCHORS, CHOSEN, STEPS = 2, 16, 32, 5
RATES = (0.01, 0.1)
METHODS = ("helpful", "harmful", "nearest", "random", "anchors")
# (d)
SIMULATED, EACH, RATE = 16, 3, 0.01
SIMULATED_STEPS = (1, 5)


def correct(run: Run, fast: Scores) -> dict[str, Any]:
    """Accuracy on held-out pairs before and after a few steps on pairs chosen for wrong HANS
    pairs."""
    run.restore()
    inputs, targets = run.queries.tensors
    said = outputs_of(run.module, inputs[run.hans]).argmax(1)
    wrong = (said != targets[run.hans]).nonzero().squeeze(1) + run.hans.start
    before = {name: _right(run.module, *pairs) for name, pairs in run.test.items()}
    after: dict[tuple[str, float, str], list[Tensor]] = {}
    fixed: dict[tuple[str, float], list[float]] = {}
    shares: dict[str, list[float]] = {}
    entailments: dict[str, list[float]] = {}
    own = torch.Generator().manual_seed(0)
    order = wrong[torch.randperm(len(wrong), generator=own)]
    groups = [group for group in order.split(ANCHORS) if len(group) == ANCHORS][:GROUPS]
    for anchors in groups:
        for method in METHODS:
            up, down = chosen_by(method, fast, anchors, own)
            chosen = torch.cat([up, down])
            shares.setdefault(method, []).append(_mean(chosen >= NUM_TRAIN))
            labels = torch.tensor([int(run.train[n][1]) for n in chosen.tolist()])
            if method == "anchors":
                labels = targets[anchors]
            entailments.setdefault(method, []).append(_mean(labels == 0))
            for rate in RATES:
                run.restore()
                descent = (
                    _pairs(run, up) if method != "anchors" else (inputs[anchors], targets[anchors])
                )
                descend(run.module, descent, _pairs(run, down), rate, STEPS)
                for name, pairs in run.test.items():
                    after.setdefault((method, rate, name), []).append(_right(run.module, *pairs))
                hit = _right(run.module, inputs[anchors], targets[anchors]).mean()
                fixed.setdefault((method, rate), []).append(float(hit))
    run.restore()
    rows = []
    for (method, rate, name), found in after.items():
        gain = torch.stack(found).mean(0) - before[name]
        rows.append(
            {
                "method": method,
                "rate": rate,
                "test": name,
                "after": interval(torch.stack(found).mean(0)),
                "gain": interval(gain),
                "gains": [float((one - before[name]).mean()) for one in found],
                "anchors_right": sum(fixed[method, rate]) / len(found),
            }
        )
    return {
        "before": {name: interval(values) for name, values in before.items()},
        "wrong": len(wrong),
        "groups": len(groups),
        "contradicting": {m: sum(v) / len(v) for m, v in shares.items() if m != "anchors"},
        "entailment": {m: sum(v) / len(v) for m, v in entailments.items()},
        "said_entailment": {
            name: _mean(outputs_of(run.module, pairs[0]).argmax(1) == 0)
            for name, pairs in run.test.items()
        },
        "rows": rows,
    }


def chosen_by(
    method: str, fast: Scores, anchors: Tensor, own: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Training pairs to descend on, and to ascend on."""
    assert fast.candidates is not None
    none = torch.zeros(0, dtype=torch.int64)
    candidates = fast.candidates[anchors, :K]
    scored = torch.zeros(len(anchors), fast.num_train, dtype=torch.float64)
    values = fast.values[anchors].double()
    total = scored.scatter(1, candidates, values.gather(1, candidates)).mean(0)
    helpful, harmful = total.topk(CHOSEN).indices, (-total).topk(CHOSEN).indices
    if method == "helpful":
        return helpful, none
    if method == "harmful":
        return none, harmful
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


def _mean(flags: Tensor) -> float:
    return float(flags.double().mean()) if len(flags) else 0.0


def _loss(module: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    return float(F.cross_entropy(outputs_of(module, inputs), targets))


def _pairs(run: Run, places: Tensor) -> tuple[Tensor, Tensor] | None:
    if not len(places):
        return None
    found = [run.train[n] for n in places.tolist()]
    return torch.stack([f[0] for f in found]), torch.stack([torch.as_tensor(f[1]) for f in found])
