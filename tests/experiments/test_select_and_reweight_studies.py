"""What experiments/select and experiments/reweight choose by, predict and count."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from experiments.reweight.orders import ORDERS, predicted_of
from experiments.reweight.words import follows
from experiments.select.less import adam_update, gradients, less_scores
from experiments.select.methods import by_score
from experiments.select.table import gains, told


def test_the_update_of_gradient_matching_is_adams() -> None:
    own = torch.Generator().manual_seed(0)
    first, rows = torch.randn(7, generator=own).double(), torch.randn(3, 7, generator=own).double()
    second = torch.rand(7, generator=own).double()
    found = adam_update(rows, first, second, 4, 0.9, 0.99, 1e-6)
    for row, update in zip(rows, found, strict=True):
        weight = nn.Parameter(torch.zeros(7).double())
        optimizer = torch.optim.Adam([weight], lr=1.0, betas=(0.9, 0.99), eps=1e-6)
        states = {"exp_avg": first, "exp_avg_sq": second}
        optimizer.state[weight] = {
            "step": torch.tensor(4.0),
            **{name: value.clone() for name, value in states.items()},
        }
        weight.grad = row.clone()
        optimizer.step()
        torch.testing.assert_close(update, -weight.detach(), rtol=1e-12, atol=0)


def test_scores_of_gradient_matching_are_cosines_by_autograd() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    pool = TensorDataset(torch.randn(70, 3), torch.randint(2, (70,)))
    target = TensorDataset(torch.randn(5, 3), torch.randint(2, (5,)))
    weights = {name: value.detach().clone() for name, value in module.named_parameters()}
    states = {
        name: {"exp_avg": torch.randn_like(value), "exp_avg_sq": torch.rand_like(value)}
        for name, value in weights.items()
    }
    held = {step: SimpleNamespace(parameters=weights, optimizer=states) for step in range(5)}
    settings = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-6}
    steps = SimpleNamespace(
        learning_rate=torch.tensor([[0.1], [0.3], [0.2], [0.4]]).double(),
        hyperparameters={name: torch.full((4, 1), value) for name, value in settings.items()},
    )
    trajectory = SimpleNamespace(checkpoints=held, steps=steps)
    run = SimpleNamespace(
        module=module, trajectory=trajectory, pool=pool, target=target, labels=pool.tensors[1]
    )
    found = less_scores(run)  # type: ignore[arg-type]

    def gradient(pairs: TensorDataset, place: int) -> torch.Tensor:
        inputs, label = pairs[place]
        loss = F.cross_entropy(module(inputs[None]), label[None])
        parts = torch.autograd.grad(loss, list(module.parameters()))
        return torch.cat([part.flatten() for part in parts])

    first, second = (
        torch.cat([state[key].flatten() for state in states.values()])
        for key in ("exp_avg", "exp_avg_sq")
    )
    rows = torch.cat([*gradients(run, weights, pool)])  # type: ignore[arg-type]
    torch.testing.assert_close(rows[69], gradient(pool, 69))
    expected = 0.0
    for step, rate in ((2, 0.2), (4, 0.3)):  # mean rates since the checkpoint before
        update = adam_update(gradient(pool, 69), first, second, step, 0.9, 0.99, 1e-6)
        expected += rate * float(F.cosine_similarity(gradient(target, 1), update, dim=0))
    assert float(found[1, 69]) == pytest.approx(expected, rel=1e-4)


def test_what_the_methods_take() -> None:
    scores = torch.cat([torch.arange(-6.0, 0.0), torch.arange(1.0, 16.0)])
    labels = torch.tensor([0] * 12 + [1] * 9)
    assert by_score("helpful", scores, labels).tolist() == [0, 1, 2, 3, 4, 5]
    assert by_score("harmful", scores, labels).tolist() == list(range(20, 10, -1))
    assert by_score("balanced", scores, labels).tolist() == [0, 1, 2, 3, 4, 12, 13, 14, 15, 16]


def test_gains_and_their_interval() -> None:
    before = {"before": {"right_hans": "0110"}}
    rows = [(before, {"right_hans": text}) for text in ("1110", "1111")]
    assert gains(rows, "hans").tolist() == [[1, 0, 0, 0.5]]  # replicas of one seed
    other = ({"before": {"right_hans": "0100"}}, {"right_hans": "1100"})
    assert gains([*rows, other], "hans").tolist() == [[1, 0, 0, 0.5], [1, 0, 0, 0]]
    assert told(gains([*rows, other], "hans")).startswith("+0.312 [+0.")


def test_an_order_is_predicted_from_its_segments() -> None:
    table = torch.arange(9.0, dtype=torch.float64).view(3, 3) ** 2  # [segment, source]
    found = dict(zip(ORDERS, predicted_of(table), strict=True))
    assert found[2, 0, 1] == -3 * (2**2 + 3**2 + 7**2)
    assert len(found) == 6


def test_how_a_margin_follows_the_words() -> None:
    lean = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 3.0]).double()
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    # Within each label; the shift between them does not count.
    assert follows(2 * lean + 9 * labels, lean, labels) == pytest.approx(1.0)
    assert follows(lean * (1 - 2 * labels), lean, labels) == pytest.approx(0.0)
