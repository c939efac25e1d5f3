"""The loss of diffusion models: draws, predictions, schedulers, timesteps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tda_lightning.examples.models import NoiseSchedule
from tda_lightning.tasks import DiffusionTask, seeded_examples
from tests import denoising

IMAGES = denoising.images().tensors[0]


def losses_of(task, module, chosen, seed=0, batch=None):
    with seeded_examples(seed, torch.tensor(chosen)):
        return task.train_loss(module, [IMAGES[chosen]] if batch is None else batch)


def prepare(task, module):
    with seeded_examples(0, torch.arange(4)):
        task.prepare(module, [IMAGES[:4]])


def test_a_loss_belongs_to_its_example_and_is_what_was_written_down():
    module = denoising.denoiser()
    task = DiffusionTask()
    together = losses_of(task, module, [0, 1, 2, 3])
    alone = [denoising.drawn_loss(module, IMAGES[n : n + 1], n, draw=0) for n in range(4)]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-12)
    assert torch.allclose(losses_of(task, module, [3, 1]), together[[3, 1]], rtol=1e-12)
    assert not torch.allclose(losses_of(task, module, [0, 1], seed=1), together[:2])


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
def test_each_kind_of_prediction_has_its_target(predicts):
    class Known(nn.Module):
        """Answers from noisy images alone, as if half of the noise were the signal."""

        def forward(self, noisy, timesteps):
            return noisy / 2

    alphas = torch.linspace(0.99, 0.01, 7, dtype=torch.float64)
    task = DiffusionTask(alphas, predicts=predicts, timesteps=[3])
    with seeded_examples(0, torch.arange(6)):
        noise = torch.randn_like(IMAGES)
    kept = alphas[3]
    noisy = kept.sqrt() * IMAGES + (1 - kept).sqrt() * noise
    target = {
        "epsilon": noise,
        "v_prediction": kept.sqrt() * noise - (1 - kept).sqrt() * IMAGES,
        "sample": IMAGES,
    }[predicts]
    with seeded_examples(0, torch.arange(6)):
        measured = task.measurement(Known(), {"images": IMAGES})
    assert torch.allclose(measured, (noisy / 2 - target).pow(2).mean((1, 2, 3)), rtol=1e-12)


def test_the_schedule_says_what_is_predicted():
    module = denoising.denoiser(predicts="v_prediction")
    said, given = DiffusionTask(), DiffusionTask(predicts="v_prediction")
    assert torch.equal(losses_of(said, module, [0, 1]), losses_of(given, module, [0, 1]))
    other = losses_of(DiffusionTask(predicts="epsilon"), module, [0, 1])
    assert not torch.equal(losses_of(said, module, [0, 1]), other)


def test_a_measurement_is_the_mean_of_its_timesteps():
    module = denoising.denoiser()
    task = DiffusionTask(timesteps=[2, 9, 19])
    examples = torch.arange(6)
    with seeded_examples(0, examples):
        whole = task.measurement(module, [IMAGES])
    parts = []
    for number in range(3):
        with seeded_examples(0, examples):
            parts.append(task.measurement_part(module, [IMAGES], torch.full((6,), number)))
    assert torch.allclose(whole, torch.stack(parts).mean(0), rtol=1e-12)
    with seeded_examples(0, examples):
        noise = torch.randn_like(IMAGES)
    expected = denoising.loss(module, IMAGES, torch.full((6,), 9), noise)
    assert torch.allclose(parts[1], expected, rtol=1e-12)


def test_settings_know_the_schedule():
    module = denoising.denoiser()
    first, second = DiffusionTask(), DiffusionTask()
    with seeded_examples(0, torch.arange(2)):
        first.prepare(module, [IMAGES[:2]])
        module.scheduler = NoiseSchedule(denoising.TIMES, last=0.2)
        second.prepare(module, [IMAGES[:2]])
    assert first.settings() != second.settings()
    assert first.settings()["timesteps"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheduler": object()}, "expected a scheduler with alphas_cumprod"),
        ({"scheduler": torch.tensor([0.5, 1.5])}, "alpha-bar must lie in 0 to 1, got 0.5 to 1.5"),
        ({"scheduler": torch.rand(3, 3)}, "expected a scheduler with alphas_cumprod"),
        (
            {"scheduler": NoiseSchedule(20), "timesteps": [5, 20, 31]},
            r"must lie in 0 to 19, which the scheduler has; got \[20, 31\]",
        ),
        ({"timesteps": [-1]}, r"numbers from 0 on, got \[-1\]"),
        ({"timesteps": []}, r"one or more numbers from 0 on, got \[\]"),
        ({"by_timestep": True}, r"expected them as timesteps=\[...\]"),
        ({"predicts": "noise"}, "predicts must be one of epsilon, v_prediction, sample"),
        ({"draws": 0}, "draws must be at least 1"),
    ],
)
def test_impossible_settings_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionTask(**settings)


def test_what_only_the_model_and_the_data_show_is_refused_when_it_is_seen():
    module = denoising.denoiser()
    with pytest.raises(ValueError, match="must lie in 0 to 19"):
        DiffusionTask(timesteps=[25]).measurement(module, [IMAGES])
    with pytest.raises(ValueError, match="has no schedule"):
        losses_of(DiffusionTask(scheduler="schedule"), module, [0])
    with pytest.raises(ValueError, match="images as a floating-point tensor"):
        losses_of(DiffusionTask(), module, [0], batch={"labels": IMAGES[:1]})
    module.forward = lambda noisy, timesteps: torch.cat([noisy, noisy], 1)
    with pytest.raises(ValueError, match="also predicts variances"):
        losses_of(DiffusionTask(), module, [0])


class Otherwise(NoiseSchedule):
    """Keeps the images and scales the noise up."""

    def add_noise(self, clean, noise, timesteps):
        kept = self.alphas_cumprod.to(clean)[timesteps].reshape(-1, *[1] * (clean.dim() - 1))
        return clean + ((1 - kept) / kept).sqrt() * noise


def test_noise_that_is_added_otherwise_is_refused_and_a_samplers_own_is_not_asked():
    module = denoising.denoiser()
    count = len(module.scheduler.alphas_cumprod)
    task = DiffusionTask(scheduler=Otherwise(count))
    with pytest.raises(ValueError, match=r"Otherwise.add_noise is not sqrt\(alpha-bar\) x"):
        prepare(task, module)
    sampler = Otherwise(count)
    sampler.sigmas = torch.ones(count)
    task = DiffusionTask(scheduler=sampler)
    prepare(task, module)
    expected = losses_of(DiffusionTask(scheduler=NoiseSchedule(count)), module, [0, 1])
    assert torch.equal(losses_of(task, module, [0, 1]), expected)


def test_samplers_of_diffusers_are_taken_by_their_alpha_bar():
    diffusers = pytest.importorskip("diffusers")
    module = denoising.denoiser()
    names = "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"
    found = []
    for name in names:
        task = DiffusionTask(scheduler=getattr(diffusers, name)(num_train_timesteps=20))
        prepare(task, module)
        found.append(losses_of(task, module, [0, 1, 2]))
    assert torch.allclose(found[0], found[1], rtol=1e-5)
    assert torch.allclose(found[0], found[2], rtol=1e-5)
    with pytest.raises(ValueError, match="DiffusionTask needs alpha-bar"):
        DiffusionTask(scheduler=diffusers.FlowMatchEulerDiscreteScheduler())


def test_a_penalty_of_the_training_step_is_in_the_curvature_of_the_task():
    module = denoising.denoiser(torch.nn.Conv2d(1, 1, 3, padding=1))
    module.forward = lambda noisy, times: module.network(noisy)
    step = module.training_step
    module.training_step = lambda batch, index: (
        step(batch, index) + 0.01 * module.network.weight.square().sum()
    )
    task = DiffusionTask()
    with seeded_examples(0, torch.arange(4)):
        task.prepare(module.eval(), [IMAGES[:4]])
    assert task.penalty.strengths == {"network.weight": pytest.approx(0.02)}
    assert sum("weight decay that it is (0.02)" in note for note in task.notes) == 1
