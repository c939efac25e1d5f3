"""Gradients of single images through U-Nets: norms of groups, attention, times, down and up."""

from __future__ import annotations

import pytest
import torch

from tda_lightning.examples.models import UNet
from tda_lightning.gradients import GradientEngine
from tda_lightning.tasks import DiffusionTask, seeded_examples
from tests import denoising


def our_own():
    return UNet(channels=1, widths=(4, 8), groups=2, heads=2)


def of_diffusers():
    return pytest.importorskip("diffusers").UNet2DModel(
        sample_size=4,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


@pytest.mark.parametrize("network", [our_own, of_diffusers])
def test_no_parameter_of_a_unet_is_differentiated_example_by_example(network):
    module = denoising.denoiser(network()).eval()
    images, examples = denoising.images(3).tensors[0], torch.arange(3)
    task = DiffusionTask()

    def loss(module, batch, examples):
        with seeded_examples(0, examples):
            return task.train_loss(module, batch)

    names = [name for name, _ in module.named_parameters()]
    engine = GradientEngine(module, names)
    engine.discover(loss, [images], examples)
    assert engine.generic == []
    found = engine.gradients(loss, [images], examples)
    parameters = list(module.parameters())
    for example in range(3):
        own = denoising.drawn_loss(module, images[example : example + 1], example, draw=0)
        plain = dict(zip(names, torch.autograd.grad(own, parameters), strict=True))
        largest = max(float(gradient.norm()) for gradient in plain.values())
        for block in engine.blocks:
            dense = found.blocks[block.name].dense(slice(example, example + 1))[0]
            for name, gradient in block.tensors(dense).items():
                # The bias of attention's keys changes nothing: its gradient is rounding.
                scale = max(float(plain[name].norm()), 1e-5 * largest)
                assert float((gradient - plain[name]).norm()) < 1e-8 * scale, name


def test_an_unchanged_step_on_the_scheduler_of_diffusers_is_taken_apart_in_a_batch():
    """Its tables are held by no module, and looked up by the timesteps that are drawn."""
    diffusers = pytest.importorskip("diffusers")
    import torch.nn.functional as F

    from tda_lightning.tasks import TrainingStepTask

    for scheduler in (
        diffusers.DDPMScheduler(num_train_timesteps=20),
        diffusers.DDIMScheduler(num_train_timesteps=20, prediction_type="v_prediction"),
    ):
        module = denoising.denoiser().eval()
        module.scheduler = scheduler

        def training_step(batch, index, module=module):
            (clean,) = batch
            noise = torch.randn_like(clean)
            times = torch.randint(0, 20, (len(clean),))
            noisy = module.scheduler.add_noise(clean, noise, times)
            target = noise
            if module.scheduler.config.prediction_type == "v_prediction":
                target = module.scheduler.get_velocity(clean, noise, times)
            return F.mse_loss(module(noisy, times), target)

        module.training_step = training_step
        images = denoising.images(3).tensors[0]
        task, examples = TrainingStepTask(), torch.arange(3)
        with seeded_examples(0, examples):
            task.prepare(module, [images])
            losses = task.train_loss(module, [images])
        assert not task.one_by_one
        for example in range(3):
            own = examples[example : example + 1]
            with seeded_examples(0, own):
                alone = task.train_loss(module, [images[example : example + 1]])
            assert torch.allclose(losses[example], alone, rtol=1e-10)
