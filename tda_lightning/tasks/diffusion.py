"""Diffusion models: the mean squared error of a denoiser over random timesteps and noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tda_lightning.runtime.digests import digest
from tda_lightning.tasks import batches
from tda_lightning.tasks.base import AttributionTask
from tda_lightning.tasks.batches import Batch
from tda_lightning.tasks.gauss_newton import sampled_gauss_newton_loss
from tda_lightning.tasks.penalty import Penalty
from tda_lightning.tasks.training_step import TrainingStepTask

PREDICTIONS = ("epsilon", "v_prediction", "sample")
IMAGE_KEYS = ("pixel_values", "images", "image", "input", "inputs", "x")


@dataclass
class DiffusionTask(AttributionTask):
    r"""The loss of a denoising diffusion model, a mean over seeded (timestep, noise) draws.

    .. math::
        l_n = \frac1K \sum_k \frac1d
            \left\| f_\theta(\sqrt{\bar\alpha_{t_k}}\, x_n + \sqrt{1 - \bar\alpha_{t_k}}\,
            \epsilon_k,\ t_k) - y_k \right\|^2

    with :math:`y = \epsilon`, or :math:`v = \sqrt{\bar\alpha} \epsilon - \sqrt{1 - \bar\alpha} x`,
    or x itself. K is ``attribute(..., draws=K)``, else :attr:`draws`. A draw depends on the seed,
    its number and the example alone (docs/methods.md, "Random steps"), so neither does the loss of
    an example depend on its batch, nor the measurement of a query.

    Of a LightningModule, estimators that follow the run's own steps (exact unrolling, SOURCE on the
    recorded order, TracIn) take the losses of its ``training_step``, with what each step drew. All
    else is this task's.

    Args:
        scheduler: what knows :math:`\bar\alpha_t`: a scheduler of diffusers, or any object with
            ``alphas_cumprod`` [timestep] (and optionally ``add_noise``); these numbers themselves;
            or the name of an attribute of the module that is one of these.
        predicts: what the network predicts: "epsilon", "v_prediction" or "sample"; None: what
            ``scheduler.config`` says, else "epsilon".
        network: name of the submodule that is called as ``network(noisy, timesteps)``; None: the
            module itself. For other calls (class labels, text) override :meth:`denoise`.
        timesteps: at which queries are measured: the measurement is the mean over them. None:
            drawn evenly from all, as in training. The loss of training examples draws them always.
        by_timestep: also keep the scores of each of ``timesteps`` (``Scores.by_timestep``).
        images: key of the images in dictionary batches; None: the first known one.
        draws: over how many draws losses and measurements are averaged.
        layers: names of modules (or prefixes) to restrict to.

    Raises:
        ValueError: a scheduler without known :math:`\bar\alpha_t`, or that adds noise otherwise;
            timesteps that it does not have; an impossible ``predicts``.

    References:
        | Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 14
        | https://arxiv.org/abs/2006.11239
        | Progressive Distillation (Salimans and Ho, 2022), sec. 4, for v
        | https://arxiv.org/abs/2202.00512
    """

    scheduler: Any = "scheduler"
    predicts: str | None = None
    network: str | None = None
    timesteps: Sequence[int] | None = None
    by_timestep: bool = False
    images: str | None = None
    draws: int = 1
    layers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.predicts is not None:
            _require_prediction(self.predicts)
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}.")
        if self.timesteps is not None:
            self.timesteps = [int(step) for step in self.timesteps]
            if not self.timesteps or min(self.timesteps) < 0:
                raise ValueError(
                    f"timesteps must be one or more numbers from 0 on, got {self.timesteps}."
                )
        if self.by_timestep and self.timesteps is None:
            raise ValueError(
                "by_timestep=True keeps the scores of each of some timesteps: expected them as "
                "timesteps=[...]."
            )
        if not isinstance(self.scheduler, str):
            self._check(*alpha_bars(self.scheduler))
        self._digest = ""
        self._step: TrainingStepTask | None = None

    # Losses.

    def train_loss(self, module: nn.Module, batch: Batch) -> Tensor:
        clean = self.clean_images(batch)
        alphas, prediction = self._known(module)
        shape, device = (len(clean),), clean.device
        timesteps = torch.randint(0, len(alphas), shape, device=device)
        return self._losses(module, batch, clean, timesteps, alphas, prediction)

    def measurement(self, module: nn.Module, batch: Batch) -> Tensor:
        if self.timesteps is None:
            return self.train_loss(module, batch)
        count = batches.num_examples(batch)
        noise = self._noise(self.clean_images(batch))
        parts = [
            self._at(module, batch, torch.full((count,), number), noise)
            for number in range(len(self.timesteps))
        ]
        return torch.stack(parts).mean(0)

    def measurement_part(self, module: nn.Module, batch: Batch, part: Tensor) -> Tensor:
        """The measurement at the timesteps of these numbers, [batch]; the noise is the same at all
        timesteps."""
        return self._at(module, batch, part, self._noise(self.clean_images(batch)))

    @property
    def measured_parts(self) -> int:
        return 1 if self.timesteps is None else len(self.timesteps)

    @property
    def kept_parts(self) -> Sequence[int] | None:
        return self.timesteps if self.by_timestep else None

    @property
    def measures_loss(self) -> bool:
        return self.timesteps is None and type(self).measurement is DiffusionTask.measurement

    def denoise(self, module: nn.Module, noisy: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        """What the network predicts for noisy images [batch, ...] at timesteps [batch]: its output,
        or the output's ``sample`` or first entry."""
        network = module if self.network is None else module.get_submodule(self.network)
        output = network(noisy, timesteps)
        output = getattr(output, "sample", output)
        return output[0] if isinstance(output, tuple) else output

    def clean_images(self, batch: Batch) -> Tensor:
        """The images of a batch, [batch, ...]: the batch itself, its first entry, or what a
        dictionary has under ``images``."""
        found = batch
        if isinstance(batch, Mapping):
            key = self.images or next((name for name in IMAGE_KEYS if name in batch), None)
            found = None if key is None else batch.get(key)
        elif isinstance(batch, (tuple, list)) and batch:
            found = batch[0]
        if not isinstance(found, Tensor) or not found.is_floating_point() or found.dim() < 2:
            got = list(batch) if isinstance(batch, Mapping) else type(found).__name__
            raise ValueError(
                "DiffusionTask expects images as a floating-point tensor [batch, ...]: the batch "
                f"itself, its first entry, or an entry of a dictionary under images=, got {got}. "
                "Override clean_images(batch) for other batches."
            )
        return found

    def sampled_loss(self, module: nn.Module, batch: Batch) -> Tensor:
        return sampled_gauss_newton_loss(self, module, batch)

    def _at(self, module: nn.Module, batch: Batch, part: Tensor, noise: Tensor) -> Tensor:
        assert self.timesteps is not None
        alphas, prediction = self._known(module)
        clean = self.clean_images(batch)
        timesteps = torch.tensor(self.timesteps, device=clean.device)[part.to(clean.device)]
        return self._losses(module, batch, clean, timesteps, alphas, prediction, noise)

    def _losses(
        self,
        module: nn.Module,
        batch: Batch,
        clean: Tensor,
        timesteps: Tensor,
        alphas: Tensor,
        prediction: str,
        noise: Tensor | None = None,
    ) -> Tensor:
        noise = self._noise(clean) if noise is None else noise
        kept = alphas.to(clean)[timesteps].reshape(-1, *[1] * (clean.dim() - 1))
        scheduler = self._scheduler(module)
        if adds_noise(scheduler):
            noisy = scheduler.add_noise(clean, noise, timesteps)
        else:
            noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        target = {
            "epsilon": noise,
            "sample": clean,
            "v_prediction": kept.sqrt() * noise - (1 - kept).sqrt() * clean,
        }[prediction]
        predicted = self.denoise(module, noisy, timesteps, batch)
        if predicted.shape != target.shape:
            raise ValueError(
                f"Expected the network to predict {prediction} of shape {list(target.shape)}, got "
                f"{list(predicted.shape)}. A network that also predicts variances needs a "
                "denoise(module, noisy, timesteps, batch) that leaves them out."
            )
        return nn.functional.mse_loss(predicted, target, reduction="none").flatten(1).mean(1)

    @staticmethod
    def _noise(clean: Tensor) -> Tensor:
        return torch.randn_like(clean)

    # What the scheduler knows.

    def _scheduler(self, module: nn.Module) -> Any:
        if not isinstance(self.scheduler, str):
            return self.scheduler
        found: Any = module
        for name in self.scheduler.split("."):
            found = getattr(found, name, None)
        if found is None:
            raise ValueError(
                f"{type(module).__name__} has no {self.scheduler}, where DiffusionTask expects the "
                "scheduler. Give scheduler= another name, the scheduler itself, or the numbers "
                "alpha-bar [timestep]."
            )
        return found

    def _known(self, module: nn.Module) -> tuple[Tensor, str]:
        """alpha-bar [timestep], and what the network predicts."""
        alphas, said = alpha_bars(self._scheduler(module))
        self._check(alphas, said)
        return alphas, self.predicts or said or "epsilon"

    def _check(self, alphas: Tensor, said: str | None) -> None:
        if self.predicts is None and said is not None:
            _require_prediction(said)
        beyond = [step for step in self.timesteps or () if step >= len(alphas)]
        if beyond:
            raise ValueError(
                f"timesteps must lie in 0 to {len(alphas) - 1}, which the scheduler has; got "
                f"{beyond}."
            )

    def settings(self) -> dict[str, object]:
        kept, self.scheduler = self.scheduler, self._digest
        try:
            return super().settings()
        finally:
            self.scheduler = kept

    # The run's own steps.

    def prepare(self, module: nn.Module, batch: Batch) -> None:
        super().prepare(module, batch)
        alphas, prediction = self._known(module)
        require_known_noise(self._scheduler(module), alphas)
        scheduler = type(self._scheduler(module))
        text = f"{scheduler.__qualname__} {prediction} {alphas.double().tolist()}"
        self._digest = digest(text)[:16]
        self._step = None
        if callable(getattr(module, "training_step", None)):
            self._step = TrainingStepTask(self.layers)
            self._step.training_batch_size = self.training_batch_size
            self._step.prepare(module, batch)
            self.notes.extend(note for note in self.penalty.notes if note not in self.notes)

    def loss_as_drawn(self, module: nn.Module, batch: Batch) -> Tensor:
        if self._step is None:
            return self.train_loss(module, batch)
        return self._step.train_loss(module, batch)

    def batch_loss(
        self, module: nn.Module, batch: Batch, by_position: bool = False
    ) -> tuple[Tensor, Tensor]:
        if self._step is None:
            return super().batch_loss(module, batch, by_position)
        return self._step.batch_loss(module, batch, by_position)

    @property
    def penalty(self) -> Penalty:
        return Penalty() if self._step is None else self._step.penalty

    def share(self, size: int) -> float:
        return super().share(size) if self._step is None else self._step.share(size)


def alpha_bars(scheduler: object) -> tuple[Tensor, str | None]:
    """alpha-bar [timestep] of a scheduler, and what it says that the network predicts.

    Raises:
        ValueError: they are not known.
    """
    found = getattr(scheduler, "alphas_cumprod", scheduler)
    try:
        alphas = torch.as_tensor(found).detach()
    except (TypeError, ValueError, RuntimeError):
        alphas = torch.empty(0)
    if alphas.dim() != 1 or not len(alphas) or not alphas.is_floating_point():
        raise ValueError(
            "DiffusionTask needs alpha-bar, the share of the signal that is left at each timestep: "
            "expected a scheduler with alphas_cumprod [timestep], or these numbers, got "
            f"{type(scheduler).__name__}. For another forward process (flow matching, EDM) use "
            "task=None, the module's own training_step."
        )
    if not bool(((alphas >= 0) & (alphas <= 1)).all()):
        raise ValueError(
            f"alpha-bar must lie in 0 to 1, got {float(alphas.min()):.3g} to "
            f"{float(alphas.max()):.3g}."
        )
    config = getattr(scheduler, "config", None)
    get = config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)
    return alphas, get("prediction_type")


def adds_noise(scheduler: object) -> bool:
    """Whether a scheduler's own ``add_noise`` is asked. Samplers with ``sigmas`` (Euler, Heun,
    DPM-Solver) add noise as their own steps need it, in other units or at other timesteps, while
    alpha-bar says what the network was trained on."""
    return hasattr(scheduler, "add_noise") and not hasattr(scheduler, "sigmas")


def require_known_noise(scheduler: Any, alphas: Tensor) -> None:
    """Compare a scheduler's own ``add_noise`` with what its alpha-bar says.

    Raises:
        ValueError: it adds noise otherwise.
    """
    if not adds_noise(scheduler):
        return
    timesteps = torch.tensor([0, len(alphas) // 2, len(alphas) - 1])
    clean, noise = torch.tensor([[1.0, 0.0, -1.0]] * 3), torch.tensor([[0.0, 1.0, 0.5]] * 3)
    found = scheduler.add_noise(clean, noise, timesteps)
    kept = alphas.to(clean)[timesteps][:, None]
    expected = kept.sqrt() * clean + (1 - kept).sqrt() * noise
    if not torch.allclose(found, expected, atol=1e-4):
        raise ValueError(
            f"{type(scheduler).__name__}.add_noise is not sqrt(alpha-bar) x + sqrt(1 - alpha-bar) "
            "noise, which DiffusionTask is about. Give the scheduler of the training, or use "
            "task=None, the module's own training_step."
        )


def _require_prediction(prediction: str) -> None:
    if prediction not in PREDICTIONS:
        raise ValueError(f"predicts must be one of {', '.join(PREDICTIONS)}, got {prediction!r}.")
