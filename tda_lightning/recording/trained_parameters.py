"""What the optimizer trains. Where that changes, or another optimizer begins, a stage begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from tda_lightning.recording.base_weights import require_unquantised
from tda_lightning.recording.sharded import Shards
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.trajectory import Facts, ParameterFact, StageFact
from tda_lightning.runtime.compiled import plain_parameters

# Parameter and its group in the optimizer, by the module's names.
Trained = Mapping[str, tuple[nn.Parameter, int]]


def trained_parameters(module: nn.Module, optimizer: Optimizer) -> Trained:
    """(parameter, group) by the module's names: what the optimizer holds and trains.

    Raises:
        UnsupportedTrainingError: the optimizer trains a parameter that is not the module's, or
            nothing at all; or a parameter has no shape yet.
    """
    lazy = [name for name, tensor in plain_parameters(module).items() if is_lazy(tensor)]
    if lazy:
        raise UnsupportedTrainingError(
            f"{', '.join(lazy)} have no shape yet when training starts (nn.LazyLinear and others "
            "like it): initial weights are recorded. Run the module on a batch before "
            "Trainer.fit, or in its setup()."
        )
    groups = _groups(optimizer)
    trained = {
        name: (parameter, groups.pop(id(parameter)))
        for name, parameter in plain_parameters(module).items()
        if id(parameter) in groups
    }
    if groups:
        raise UnsupportedTrainingError(
            f"The optimizer trains {len(groups)} parameters that are not among the module's "
            f"named_parameters() (in parameter groups {sorted(set(groups.values()))}); expected "
            "all of them there. Register them in the LightningModule."
        )
    require_unquantised({name: parameter for name, (parameter, _) in trained.items()})
    if not trained:
        raise UnsupportedTrainingError(
            "The optimizer trains no parameter: each one it holds has requires_grad=False, "
            "expected at least one to record."
        )
    return trained


def _groups(optimizer: Optimizer) -> dict[int, int]:
    """Group of every parameter that the optimizer holds and trains, by the parameter's id."""
    return {
        id(parameter): number
        for number, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
        if parameter.requires_grad
    }


def _group_ids(trained: Trained) -> dict[int, int]:
    return {id(parameter): group for parameter, group in trained.values()}


class TrainedParameters:
    """The parameters that the optimizer of one fit trains, by the module's names.

    Attributes:
        ever: (parameter, group) of those that any stage of the run has trained so far.
        shards: how they are spread over processes; None where every process holds all of them.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.module, self.optimizer = trainer.lightning_module, trainer.optimizers[0]
        self.ever = trained_parameters(self.module, self.optimizer)
        self.shards = Shards.of(trainer.model)  # type: ignore[arg-type]
        self._now = _group_ids(self.ever)  # those of the present stage

    def of_stage(self) -> dict[str, nn.Parameter]:
        """Those that the present stage trains."""
        return {name: p for name, (p, _) in self.ever.items() if id(p) in self._now}

    def gradient_norm(self) -> Tensor:
        """Norm of the present stage's gradient; of this process's pieces where it is spread."""
        if self.shards is not None:
            return self.shards.gradient_norm(self.of_stage())
        return gradient_norm(list(self.of_stage().values()))

    def facts(self) -> dict[str, ParameterFact]:
        """Shape, dtype and group of every one; shapes are those of whole parameters."""
        shapes = {} if self.shards is None else self.shards.shapes
        return {
            name: ParameterFact(
                tuple(shapes.get(name, parameter.shape)),
                str(parameter.dtype).removeprefix("torch."),
                group,
            )
            for name, (parameter, group) in self.ever.items()
        }

    def changed(self) -> bool:
        """Whether the optimizer trains other parameters than those of the present stage."""
        return _groups(self.optimizer) != self._now

    def require_unchanged(self, step: int) -> None:
        """Check that a step trains what was trained when its first batch began.

        Raises:
            UnsupportedTrainingError: it does not.
        """
        if self.changed():
            raise UnsupportedTrainingError(
                f"The set of trained parameters changed in the middle of step {step}: expected "
                f"the {len(self._now)} that it began with, got {len(_groups(self.optimizer))}. "
                "Freeze and unfreeze between optimizer steps, for instance in "
                "on_train_epoch_start."
            )

    def begin_stage(self, facts: Facts, start: int) -> Facts:
        """The facts of a run whose rows from ``start`` on train what the optimizer trains now.

        A stage that got no row, or lies beyond ``start``, has never happened.

        Raises:
            UnsupportedTrainingError: a parameter has moved to another group of the optimizer.
        """
        trained = trained_parameters(self.module, self.optimizer)
        moved = [n for n, (_, g) in trained.items() if n in self.ever and self.ever[n][1] != g]
        if moved:
            name = moved[0]
            raise UnsupportedTrainingError(
                f"Parameter {name} moved from group {self.ever[name][1]} of the optimizer to group "
                f"{trained[name][1]} ({len(moved)} parameters in all moved); expected each to stay "
                "where it was. Change a group's settings instead, or add groups behind the others."
            )
        stages = [stage for stage in facts.stages if stage.start < start]
        new_fit = any(stage.new_optimizer for stage in facts.stages if stage.start == start)
        # Frozen and unfrozen again without a step in between, the stage before just goes on.
        if not stages or new_fit or stages[-1].parameters != tuple(trained):
            stages.append(StageFact(start, tuple(trained), new_fit))
        used = {name for stage in stages for name in stage.parameters}
        both = {**self.ever, **trained}
        self.ever = {name: both[name] for name in plain_parameters(self.module) if name in used}
        self._now = _group_ids(trained)
        return replace(facts, parameters=self.facts(), stages=tuple(stages))

    def resume(self, facts: Facts) -> None:
        """Take up the last stage of a recorded run. What the module lacks is left out: the
        comparison with the facts will say so."""
        module = plain_parameters(self.module)
        self.ever = {
            name: self.ever.get(name, (module[name], fact.group))
            for name, fact in facts.parameters.items()
            if name in module
        }
        stage = facts.stages[-1].parameters
        self._now = _group_ids({name: self.ever[name] for name in stage if name in self.ever})


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, left on the device: float32 or better, []."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    if len({(g.device, g.dtype) for g in dense}) == 1 and not _wide(dense[0].dtype):
        # One call for all of them: forty small ones cost a small model a hundredth of its step.
        norms = list(torch._foreach_norm([g.detach() for g in dense]))
    else:
        norms = [torch.linalg.vector_norm(g.detach(), dtype=_wide(g.dtype)) for g in dense]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def _wide(dtype: torch.dtype) -> torch.dtype | None:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else None
