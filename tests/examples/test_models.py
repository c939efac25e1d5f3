"""The example models: shapes, schedules, and a training run of each kind."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning.examples.models import (
    CNN,
    GPT,
    MLP,
    Classifier,
    Denoiser,
    Encoder,
    LanguageModel,
    NoiseSchedule,
    Regressor,
    ResNet9,
    UNet,
    constant,
    cosine,
    linear,
    one_cycle,
)
from tda_lightning.examples.models.blocks import Attention
from tda_lightning.examples.models.encoder import kinds_of

IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 11, (6, 5), generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 1, 2, 0, 1, 2])

CASES = [
    (Classifier(CNN(1, 8, [4, 4], 3, hidden=5, dropout=0.1)), (IMAGES, CLASSES)),
    (Classifier(Encoder(11, 5, 3, width=8, depth=1, heads=2, dropout=0.1)), (TOKENS, CLASSES)),
    (Classifier(MLP(64, [7], 3, activation="gelu", dropout=0.1)), (IMAGES, CLASSES)),
    (Regressor(MLP(64, [7, 7], 2, activation="tanh")), (IMAGES, torch.ones(6, 2))),
    (LanguageModel(GPT(11, 5, width=8, depth=1, heads=2, dropout=0.1)), (TOKENS, TOKENS)),
]


@pytest.mark.parametrize(("module", "data"), CASES)
def test_trains_with_the_configured_optimizer_and_schedule(module, data):
    torch.manual_seed(0)
    module._optimizer = partial(torch.optim.SGD, lr=0.5)
    module._scheduler = linear
    rates = []
    module.on_train_batch_start = lambda *_: rates.append(module.optimizers().param_groups[0]["lr"])
    before = {name: value.clone() for name, value in module.named_parameters()}
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(*data), batch_size=3))
    assert rates == pytest.approx([0.5, 0.375, 0.25, 0.125])
    assert all(not value.equal(before[name]) for name, value in module.named_parameters())


def test_resnet9_normalises_by_frozen_statistics_in_eval():
    network = ResNet9(width=4).eval()
    images = torch.randn(3, 3, 32, 32)
    alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(network(images), alone)
    assert alone.shape == (3, 10)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_sampling_leads_to_what_the_denoiser_believes_in(predicts):
    """A network that knows the only image there is: every sample is that image."""
    schedule = NoiseSchedule(50, last=0.3, prediction_type=predicts)
    image = torch.linspace(-0.9, 0.9, 16).view(1, 1, 4, 4)

    class Knows(nn.Module):
        def forward(self, noisy, timesteps):
            kept = schedule.alphas_cumprod.float()[timesteps].view(-1, 1, 1, 1)
            noise = (noisy - kept.sqrt() * image) / (1 - kept).sqrt()
            return schedule.target(image, noise, timesteps)

    sampled = Denoiser(Knows(), schedule).sample(torch.randn(3, 1, 4, 4), steps=10)
    torch.testing.assert_close(sampled, image.expand(3, 1, 4, 4), atol=1e-4, rtol=1e-4)


def test_unet_keeps_sizes_and_refuses_widths_without_groups():
    network = UNet(channels=2, widths=(8, 16, 24), groups=8, heads=2)
    assert network(torch.randn(3, 2, 8, 8), torch.tensor([0, 5, 9])).shape == (3, 2, 8, 8)
    with pytest.raises(ValueError, match=r"widths must be multiples of groups=8, got \[8, 12\]"):
        UNet(widths=[8, 12])
    with pytest.raises(ValueError, match="prediction_type must be"):
        NoiseSchedule(prediction_type="sample")


@pytest.mark.parametrize("tied", [False, True])
def test_gpt_does_not_look_ahead(tied):
    torch.manual_seed(0)
    network = GPT(vocabulary_size=11, context=5, width=8, depth=2, heads=2, tied=tied)
    changed = TOKENS.clone()
    changed[:, 3:] = (changed[:, 3:] + 1) % 11
    logits, other = network(TOKENS), network(changed)
    torch.testing.assert_close(logits[:, :3], other[:, :3])
    assert not torch.allclose(logits[:, 3:], other[:, 3:])
    assert (network.head.weight is network.tokens.weight) == tied


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    ours = Attention(8, heads=2, dropout=0.0)
    theirs = nn.MultiheadAttention(8, 2, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.project_in.weight,
            "in_proj_bias": ours.project_in.bias,
            "out_proj.weight": ours.project_out.weight,
            "out_proj.bias": ours.project_out.bias,
        }
    )
    hidden = torch.randn(2, 5, 8)
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected, _ = theirs(hidden, hidden, hidden, attn_mask=future)
    torch.testing.assert_close(ours(hidden, future), expected)
    padded = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected, _ = theirs(hidden, hidden, hidden, key_padding_mask=padded)
    torch.testing.assert_close(ours(hidden, padded[:, None, None, :]), expected)


def test_encoder_does_not_see_padding():
    torch.manual_seed(0)
    network = Encoder(vocabulary_size=11, context=8, outputs=3, width=8, depth=2, heads=2)
    pair = torch.tensor([[5, 6, 2, 6, 7]])
    padded = F.pad(pair, (0, 3))
    torch.testing.assert_close(network(padded), network(pair))
    with torch.no_grad():
        network.tokens.weight[0] += 1
    torch.testing.assert_close(network(padded), network(pair))
    # Order, every word, and the words of the other sentence do count.
    for other in ([6, 5, 2, 6, 7], [5, 6, 2, 6, 8], [5, 6, 2, 8, 7]):
        assert not torch.allclose(network(torch.tensor([other])), network(pair))


def test_encoder_knows_words_that_both_sentences_share():
    pairs = torch.tensor([[5, 6, 2, 6, 5, 8, 0], [7, 2, 9, 9, 0, 0, 0], [5, 5, 6, 7, 5, 6, 7]])
    expected = [[1, 1, 2, 3, 3, 2, 2], [0, 2, 2, 2, 2, 2, 2], [0] * 7]
    assert kinds_of(pairs, separator=2).tolist() == expected


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (constant, [1, 1, 1, 1]),
        (partial(constant, warmup=0.5), [1 / 3, 2 / 3, 1, 1]),
        (partial(linear, final=0.2), [1, 0.8, 0.6, 0.4]),
        (cosine, [1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_schedules(schedule, expected):
    assert _rates(schedule, 4) == pytest.approx(expected, abs=1e-6)


def test_one_cycle_rises_and_falls_and_leaves_momentum_alone():
    rates = _rates(partial(one_cycle, warmup=0.5, start=0.1, final=0.01), 11)
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) <= 1
    assert rates[-1] == pytest.approx(0.01)
    assert 3 < rates.index(max(rates)) < 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP(1, [1], 1, activation="swish"), "must be one of relu, gelu, tanh, silu"),
        (lambda: CNN(1, 4, [1, 1, 1], 2), "Give fewer widths"),
        (lambda: GPT(5, 5, width=6, heads=4), "multiple of heads, got 6 and 4"),
        (lambda: GPT(5, 2, width=4)(torch.zeros(1, 3, dtype=torch.int64)), "longer than"),
        (lambda: Encoder(5, 5, 2, width=6, heads=4), "multiple of heads, got 6 and 4"),
        (lambda: Encoder(5, 2, 2)(torch.ones(1, 3, dtype=torch.int64)), "3 tokens are longer than"),
        (lambda: linear(torch.optim.SGD([torch.ones(1)], lr=1), 3, warmup=2), "got 2"),
        (lambda: Regressor(MLP(1, [1], 1)).configure_optimizers(), "without an optimizer"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def _rates(schedule, steps):
    optimizer = torch.optim.SGD([torch.ones(1)], lr=1.0, momentum=0.9)
    scheduler = schedule(optimizer, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["momentum"] == 0.9
    return rates
