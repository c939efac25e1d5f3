r"""From SOURCE to exact unrolling, one assumption at a time, with dense matrices in float64.

python -m experiments.exactness.ladder study=smooth_sgd data.root=FOLDER

Both carry the adjoint of a query back through the recorded steps. SOURCE puts something simpler in
the place of what happened at a step; here every such place is a switch with the simple and the true
value. Three tables: a ladder that turns the switches one after the other, SOURCE with one switch
turned, and exact unrolling with one switch turned back. Scores are judged by their correlation with
exact unrolling's, and by retraining.

The rung "SOURCE" is tda_lightning's own (exact curvature); with all switches simple, and steps
instead of the matrix exponential, the recursion here is "steps". With all switches true it must
equal tda_lightning's Unrolled.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor

from experiments.lds.linear import doubled
from experiments.lds.study import quiet, record
from tda_lightning import AttributionModule, Trajectory
from tda_lightning.estimators import Source, Unrolled
from tda_lightning.evaluation import (
    draw_subsets,
    leave_one_out,
    linear_datamodeling_score,
    measure,
    retrain_each,
)

_CONF = Path(__file__).parent / "conf"


@dataclass(frozen=True)
class Switches:
    """What stands at each step for what happened there; the first value is SOURCE's.

    Attributes:
        order: an example's share of a step's gradient: 1/N in every step (``even``), or what its
            batch gave it (``recorded``).
        momentum: ``effective``: no memory, the rate times 1/(1 - momentum); for Adam, the gradient
            in the place of the first moment. ``recursion``: the buffer as it is.
        curvature: of the training set, its Gauss-Newton matrix (``gauss_newton``) or its Hessian
            (``hessian``), mean over the segment's checkpoints; the training set's Hessian at the
            weights of every step (``per_step``); the Hessian of the step's batch (``per_batch``).
        gradients: of examples: mean over the segment's checkpoints (``checkpoints``), a straight
            line between the checkpoints before and after the step (``interpolated``), or at the
            weights of every step (``per_step``).
        second: Adam's 1/(sqrt(v) + eps): mean over the segment's checkpoints (``checkpoints``), of
            every step but held fixed in the derivative (``fixed``), or differentiated
            (``differentiated``).
    """

    order: str = "even"
    momentum: str = "effective"
    curvature: str = "gauss_newton"
    gradients: str = "checkpoints"
    second: str = "checkpoints"


EXACT = Switches("recorded", "recursion", "per_batch", "per_step", "differentiated")
TURNS = [
    ("recorded order", {"order": "recorded"}),
    ("momentum's recursion", {"momentum": "recursion"}),
    ("Hessian for Gauss-Newton", {"curvature": "hessian"}),
    ("Hessian of every step", {"curvature": "per_step"}),
    ("Hessian of the batch", {"curvature": "per_batch"}),
    ("gradients interpolated", {"gradients": "interpolated"}),
    ("gradients of every step", {"gradients": "per_step"}),
    ("second moment of every step", {"second": "fixed"}),
    ("second moment differentiated", {"second": "differentiated"}),
]


def main() -> None:
    """Record, climb, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help="of conf/ladder.yaml, as for Hydra")
    parser.add_argument(
        "--short",
        action="store_true",
        help="the ladder alone, without the training set's Hessian of every step: for more weights",
    )
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with initialize_config_dir(str(_CONF.resolve()), version_base="1.3"):
        config = compose("ladder", [*options.overrides, *_search_path()])
    torch.set_num_threads(config.threads)
    data, module, task = record(config)
    train, query = doubled(data.train_dataset), doubled(data.query_dataset)
    module.double()
    trajectory = Trajectory.load(config.output)
    scores = climb(trajectory, module, task, train, query, options.short)
    judged = judge(config, scores, trajectory, module, task, train, query)
    Path(config.output, "results.json").write_text(json.dumps(judged, indent=1))
    print(table(config.name, judged))


def climb(
    trajectory: Trajectory, module: Any, task: Any, train: Any, query: Any, short: bool
) -> dict[str, Tensor]:
    """Scores of every rung, [query, train], by name."""

    def attribute(estimator: Any) -> Tensor:
        attribution = AttributionModule(module, trajectory, estimator, task)
        found = attribution.attribute(train, query, trainer=quiet(), self_influence=False)
        if "certificate" in found.provenance:
            print(f"  certificate: {found.provenance['certificate']}")
        return found.values.double()

    library = {
        "SOURCE": attribute(Source(curvature="exact")),
        "Source(order='recorded')": attribute(Source(curvature="exact", order="recorded")),
        "Unrolled": attribute(Unrolled()),
    }
    run = DenseRun.of(trajectory, module, train, query)
    adam = trajectory.facts.optimizer != "SGD"
    memory = adam or bool(trajectory.steps.hyperparameters["momentum"].any())
    turns = [
        (name, turn)
        for name, turn in TURNS
        if (adam or "second" not in turn)
        and (memory or "momentum" not in turn)
        and not (short and turn.get("curvature") == "per_step")
    ]
    rungs, at = {"steps": Switches()}, Switches()
    for name, turn in turns:
        at = replace(at, **turn)
        rungs[f"+ {name}"] = at
    for name, turn in [] if short else turns:
        rungs[f"SOURCE, {name}"] = replace(Switches(), **turn)
    for name, turn in [] if short else turns:
        rungs[f"exact without: {name}"] = replace(EXACT, **back(turn))
    distinct = list(dict.fromkeys(rungs.values()))
    found = dict(zip(distinct, run.scores(distinct), strict=True))
    dense = {name: found[switches] for name, switches in rungs.items()}
    top = found[at]
    error = float((top - library["Unrolled"]).abs().max() / top.abs().max())
    print(f"  the last rung is Unrolled to {error:.1e} of the largest score")
    return {**library, **dense}


def back(turn: dict[str, str]) -> dict[str, str]:
    """What undoes one turn and leaves the others as they are."""
    ((key, value),) = turn.items()
    values = [getattr(Switches(), key)] + [own[key] for _, own in TURNS if key in own]
    return {key: values[values.index(value) - 1]}


@dataclass
class DenseRun:
    """The run replayed with one flat vector of parameters, with whatever a rung may ask for.

    Attributes:
        residuals: of examples at flat parameters: (theta, inputs, targets) -> [batch]; the loss is
            their square.
        theta: before every step, and at the end [steps + 1, parameters]; ``gradient``, ``first``
            and ``second`` likewise, of and after every step (moments of Adam only).
    """

    trajectory: Trajectory
    residuals: Callable[[Tensor, Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor
    query: Tensor
    theta: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor
    _kept: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, trajectory: Trajectory, module: Any, train: Any, query: Any) -> DenseRun:
        """Replay, and check that it lands on the recorded end."""
        names = list(trajectory.facts.parameters)
        start, end = (trajectory.checkpoints[s].parameters for s in (0, trajectory.last_step))
        shapes = [start[name].shape for name in names]

        def residuals(theta: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
            parts = theta.split([shape.numel() for shape in shapes])
            named = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
            outputs = torch.func.functional_call(module, named, (inputs,))
            return (outputs - targets)[:, 0]

        inputs, targets = train.tensors
        theta = _flat([start[name] for name in names])
        first, second, count = torch.zeros_like(theta), torch.zeros_like(theta), 0
        kept: dict[str, list[Tensor]] = {key: [] for key in ("theta", "g", "m", "v")}
        for row in range(trajectory.last_step):
            kept["theta"].append(theta)
            (batch,) = trajectory.steps.batches(row)
            gradient = torch.func.grad(
                lambda at, b=batch: residuals(at, inputs[b], targets[b]).square().mean()
            )(theta)
            settings, count = _settings(trajectory, row), count + 1
            rate, decay = settings["rate"], settings["weight_decay"]
            if trajectory.facts.optimizer != "AdamW":
                gradient = gradient + decay * theta
            if trajectory.facts.optimizer == "SGD":
                first = settings["momentum"] * first + gradient
                ahead = gradient + settings["momentum"] * first
                theta = theta - rate * (ahead if settings["nesterov"] else first)
            else:
                if trajectory.facts.optimizer == "AdamW":
                    theta = (1 - rate * decay) * theta
                beta1, beta2 = settings["beta1"], settings["beta2"]
                first = beta1 * first + (1 - beta1) * gradient
                second = beta2 * second + (1 - beta2) * gradient.square()
                root = (second / (1 - beta2**count)).sqrt()
                theta = theta - rate / (1 - beta1**count) * first / (root + settings["eps"])
            kept["g"].append(gradient)
            kept["m"].append(first)
            kept["v"].append(second)
        missed = float((theta - _flat([end[name] for name in names])).abs().max())
        print(f"  {len(theta)} parameters; the dense replay lands within {missed:.1e}")
        measured = torch.func.vmap(
            torch.func.grad(lambda at, x, y: residuals(at, x[None], y[None])[0] ** 2), (None, 0, 0)
        )(theta, *query.tensors)
        stacked = [torch.stack(kept[key]) for key in ("g", "m", "v")]
        every = torch.stack([*kept["theta"], theta])
        return cls(trajectory, residuals, inputs, targets, measured, every, *stacked)

    def scores(self, rungs: list[Switches]) -> list[Tensor]:
        """All rungs in one walk back, so that the matrices of a step are made once."""
        walks = [_Walk(self, switches) for switches in rungs]
        per_step = any(switches.curvature == "per_step" for switches in rungs)
        for segment in reversed(self.trajectory.segments(3)):
            kept = {step: self.matrices(step) for step in segment.checkpoints}
            mean = {
                what: sum(found[what] for found in kept.values()) / len(kept)
                for what in ("gauss_newton", "hessian", "gradients", "metric")
            }
            for row in reversed(range(segment.start, segment.stop)):
                facts = self.facts(row, mean) | self.between(row)
                if per_step:
                    every = torch.arange(len(self.inputs))
                    facts["curvature", "per_step"] = self.hessian(self.theta[row], every)
                for walk in walks:
                    walk.step(row, facts)
        return [walk.scores for walk in walks]

    def matrices(self, step: int) -> dict[str, Tensor]:
        """What SOURCE takes from a checkpoint."""
        theta, size = self.theta[step], len(self.inputs)
        jacobian = torch.func.jacrev(self.residuals)(theta, self.inputs, self.targets)
        return {
            "gauss_newton": 2 * jacobian.T @ jacobian / size,
            "hessian": self.hessian(theta, torch.arange(size)),
            "gradients": self.gradients(theta),
            "metric": self.metric(step - 1),
        }

    def facts(self, row: int, mean: dict[str, Tensor]) -> dict[tuple[str, str], Any]:
        """What every switch may put at a step."""
        theta, size = self.theta[row], len(self.inputs)
        (batch,) = self.trajectory.steps.batches(row)
        shares = torch.zeros(size, dtype=theta.dtype)
        shares[batch] = 1 / len(batch)
        metric = self.metric(row)
        return {
            ("order", "even"): torch.full_like(shares, 1 / size),
            ("order", "recorded"): shares,
            ("curvature", "gauss_newton"): mean["gauss_newton"],
            ("curvature", "hessian"): mean["hessian"],
            ("curvature", "per_batch"): self.hessian(theta, batch),
            ("gradients", "checkpoints"): mean["gradients"],
            ("gradients", "per_step"): self.gradients(theta),
            ("second", "checkpoints"): mean["metric"],
            ("second", "fixed"): metric,
            ("second", "differentiated"): metric,
        }

    def between(self, row: int) -> dict[tuple[str, str], Any]:
        """Gradients on the line between the two checkpoints around a step."""
        steps = sorted(self.trajectory.checkpoints)
        after = next(step for step in steps if step > row)
        before = steps[steps.index(after) - 1]
        for step in (before, after):
            if step not in self._kept:
                self._kept[step] = self.gradients(self.theta[step])
        ends = self._kept[before], self._kept[after]
        line = torch.lerp(*ends, (row - before) / (after - before))
        return {("gradients", "interpolated"): line}

    def hessian(self, theta: Tensor, examples: Tensor) -> Tensor:
        inputs, targets = self.inputs[examples], self.targets[examples]

        def loss(at: Tensor) -> Tensor:
            return self.residuals(at, inputs, targets).square().mean()

        # In chunks that stay in the cache: twice as fast as torch.func.hessian.
        return torch.func.jacrev(torch.func.jacrev(loss), chunk_size=64)(theta)

    def gradients(self, theta: Tensor) -> Tensor:
        one = torch.func.grad(lambda at, x, y: self.residuals(at, x[None], y[None])[0] ** 2)
        return torch.func.vmap(one, (None, 0, 0))(theta, self.inputs, self.targets)

    def metric(self, row: int) -> Tensor:
        """What Adam multiplies the first moment by; ones for SGD."""
        if self.trajectory.facts.optimizer == "SGD":
            return torch.ones_like(self.theta[0])
        settings = _settings(self.trajectory, row)
        root = (self.second[row] / (1 - settings["beta2"] ** (row + 1))).sqrt()
        return 1 / (root + settings["eps"])


class _Walk:
    """One rung on its way back (docs/methods.md, "Exact unrolling")."""

    def __init__(self, run: DenseRun, switches: Switches) -> None:
        self.run, self.switches = run, switches
        self.a = run.query.clone()
        self.b, self.e = torch.zeros_like(self.a), torch.zeros_like(self.a)
        self.scores = torch.zeros(len(run.query), len(run.inputs), dtype=self.a.dtype)

    def step(self, row: int, facts: dict[tuple[str, str], Any]) -> None:
        found = {key: facts[key, value] for key, value in self._needed()}
        settings = _settings(self.run.trajectory, row)
        optimizer, decay = self.run.trajectory.facts.optimizer, settings["weight_decay"]
        u = self._sgd(settings) if optimizer == "SGD" else self._adam(row, settings, found)
        self.scores -= (u @ found["gradients"].T) * found["order"]
        if optimizer == "AdamW":
            self.a = (1 - settings["rate"] * decay) * self.a
        else:
            self.a = self.a + decay * u
        self.a = self.a + u @ found["curvature"]

    def _needed(self) -> Iterator[tuple[str, str]]:
        for key, value in asdict(self.switches).items():
            if key != "momentum":
                yield key, value

    def _sgd(self, settings: dict[str, float]) -> Tensor:
        rate, momentum = settings["rate"], settings["momentum"]
        if self.switches.momentum == "effective":
            return -rate / (1 - momentum) * self.a
        nesterov = bool(settings["nesterov"])
        self.b = self.b - rate * (momentum if nesterov else 1) * self.a
        u = self.b - rate * self.a if nesterov else self.b
        self.b = momentum * self.b
        return u

    def _adam(self, row: int, settings: dict[str, float], found: dict[str, Any]) -> Tensor:
        run, rate = self.run, settings["rate"]
        beta1, beta2 = settings["beta1"], settings["beta2"]
        correction1, correction2 = 1 - beta1 ** (row + 1), 1 - beta2 ** (row + 1)
        if self.switches.momentum == "effective":
            u = -rate * found["second"] * self.a
        else:
            self.b = self.b - rate / correction1 * found["second"] * self.a
            u = (1 - beta1) * self.b
            self.b = beta1 * self.b
        if self.switches.second == "differentiated":
            root = (run.second[row] / correction2).sqrt()
            slope = run.first[row] * found["second"] ** 2 / (2 * correction2 * root)
            self.e = self.e + rate / correction1 * slope * self.a
            u = u + 2 * (1 - beta2) * run.gradient[row] * self.e
            self.e = beta2 * self.e
        return u


def judge(
    config: DictConfig,
    scores: dict[str, Tensor],
    trajectory: Trajectory,
    module: Any,
    task: Any,
    train: Any,
    query: Any,
) -> dict[str, dict[str, Any]]:
    """Each rung against exact unrolling, subsets and single examples left out."""
    count, exact = len(train), scores["Unrolled"]
    subsets = draw_subsets(count, config.fraction, config.num_subsets, config.subset_seed)
    examples = torch.randperm(count, generator=torch.Generator().manual_seed(config.subset_seed))
    examples = examples[: config.left_out]
    single = torch.ones(config.left_out + 1, count, dtype=torch.float64)
    single[torch.arange(1, config.left_out + 1), examples] = 0
    weights = torch.cat([single, subsets.double()])
    work = (trajectory, module, task, train)
    outcomes = torch.stack(
        [
            measure(module, task, state, query)
            for state in retrain_each(*work, weights, together=config.together)
        ]
    )
    first = config.left_out + 1
    judged = {}
    for name, item in scores.items():
        lds = linear_datamodeling_score(item, subsets, outcomes[first:])
        left_out = leave_one_out(item, examples, outcomes[1:first], outcomes[0])
        judged[name] = {
            "correlation": float(
                torch.corrcoef(torch.stack([item.flatten(), exact.flatten()]))[0, 1]
            ),
            "slope": float((item * exact).sum() / item.square().sum()),
            "lds": [lds.value, lds.low, lds.high],
            "left_out": [left_out.slope, left_out.correlation],
        }
    return judged


def table(name: str, judged: dict[str, dict[str, Any]]) -> str:
    """The rungs as a markdown table."""
    lines = [
        f"| {name} | correlation with exact | slope | LDS | left out singly: correlation, slope |",
        "|---|---|---|---|---|",
    ]
    for rung, found in judged.items():
        value, low, high = found["lds"]
        slope, correlation = found["left_out"]
        lines.append(
            f"| {rung} | {found['correlation']:.4f} | {found['slope']:.3f} | {value:.3f} "
            f"[{low:.3f}, {high:.3f}] | {correlation:.4f}, {slope:.3f} |"
        )
    return "\n".join(lines)


def _settings(trajectory: Trajectory, row: int) -> dict[str, float]:
    hyper = trajectory.steps.hyperparameters
    return {
        "rate": float(trajectory.steps.learning_rate[row, 0]),
        **{name: float(values[row, 0]) for name, values in hyper.items()},
    }


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors])


def _search_path() -> list[str]:
    """The groups of experiments/lds, among them the studies."""
    return [f"hydra.searchpath=[file://{_CONF.parents[1] / 'lds' / 'conf'}]"]


if __name__ == "__main__":
    main()
