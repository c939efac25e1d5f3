"""Builds the module of a configuration, with the optimizer that LightningCLI would put into it."""

from __future__ import annotations

from types import MethodType
from typing import Any

from lightning.pytorch import LightningModule
from omegaconf import DictConfig
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tda_lightning.cli.run_config import build

OPTIMIZER, SCHEDULER = "module_optimizer", "module_lr_scheduler"
_OURS = "tda_lightning.examples.models."


def build_module(
    config: DictConfig, trust: bool, changes: dict[str, Any] | None = None, trained: bool = True
) -> LightningModule:
    """The module that a configuration describes.

    Args:
        changes: arguments that replace configured ones.
        trained: whether it is going to be trained: the models of this library are made without an
            optimizer where not.

    Raises:
        TypeError: it is no LightningModule.
        ValueError: a class from elsewhere, without ``trust``.
    """
    changes = dict(changes or {})
    if not trained and str(config.model.get("_target_")).startswith(_OURS):
        changes |= {"optimizer": None, "scheduler": None}
    module = build(config.model, trust, **changes)
    if not isinstance(module, LightningModule):
        raise TypeError(
            f"The module must be a LightningModule of lightning.pytorch, got "
            f"{type(module).__module__}.{type(module).__qualname__}."
        )
    if trained and config.get(OPTIMIZER) is not None:
        _link_optimizer(module, config, trust)
    return module


def _link_optimizer(module: LightningModule, config: DictConfig, trust: bool) -> None:
    """Let the module configure the optimizer that stands beside it in the file, as LightningCLI
    does."""
    optimizer_node, scheduler_node = config[OPTIMIZER], config.get(SCHEDULER)

    def configure_optimizers(self: LightningModule) -> Any:
        optimizer = _made(optimizer_node, trust, self.parameters())
        if scheduler_node is None:
            return optimizer
        monitor = scheduler_node.get("monitor")
        node = {name: value for name, value in scheduler_node.items() if name != "monitor"}
        scheduler = _made(node, trust, optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "monitor": monitor},
            }
        return [optimizer], [scheduler]

    module.configure_optimizers = MethodType(configure_optimizers, module)  # type: ignore[method-assign]


def _made(node: Any, trust: bool, argument: Any) -> Any:
    return build({**node, "_partial_": True}, trust)(argument)
