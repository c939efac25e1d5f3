"""Modules spread over two processes by torch's own FSDP, on the CPU: gathered whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.utils.data import TensorDataset

from tda_lightning import AttributionModule
from tda_lightning.estimators import TracIn
from tda_lightning.recording.checkpoints import read_checkpoint
from tda_lightning.recording.several_processes import interleaved
from tda_lightning.recording.sharded import Shards
from tda_lightning.recording.trained_parameters import TrainedParameters, trained_parameters
from tda_lightning.records.errors import UnsupportedTrainingError
from tda_lightning.records.trajectory import ParameterFact
from tda_lightning.runtime.compiled import plain_name
from tda_lightning.store import open_trajectory
from tests.attributing import quiet
from tests.cases.training import CLASSIFIER, OPTIMIZERS
from tests.cases.training import train as train_case
from tests.processes import connect, outcomes, results
from tests.recording.test_processes import Plain, require_equal, steps_of, train
from tests.runs import adamw

pytestmark = pytest.mark.filterwarnings("ignore")

CPU = torch.device("cpu")


def build() -> nn.Module:
    """Nested layers, a frozen one, buffers that count; odd sizes, so that pieces are uneven."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1, bias=False))
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Tanh(), inner)
    module[2].requires_grad_(False)
    return module


def wrap_old(module: nn.Module, strategy: str = "FULL_SHARD", **options: Any) -> nn.Module:
    chosen = {
        "sharding_strategy": ShardingStrategy[strategy],
        "use_orig_params": True,
        "device_id": CPU,
        **options,
    }
    module[4] = FullyShardedDataParallel(module[4], **chosen)
    return FullyShardedDataParallel(module, **chosen)


def wrap_new(module: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(module[4], mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


WRAPS = {
    "fully sharded": wrap_old,
    "gradients sharded": lambda module: wrap_old(module, "SHARD_GRAD_OP"),
    "not sharded": lambda module: wrap_old(module, "NO_SHARD"),
    "fully_shard": wrap_new,
}
MAKERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01),
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.1, 0.9),
}


def batch(rank: int) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))


def gather(rank: int) -> dict[tuple[str, str], Any]:
    """Two steps under every wrapper and optimizer; what comes together, and each share's norm."""
    connect(rank)
    found = {}
    for wrapped in WRAPS:
        for optimizer in MAKERS:
            module = WRAPS[wrapped](build())
            stepper = MAKERS[optimizer](p for p in module.parameters() if p.requires_grad)
            trained = trained_parameters(module, stepper)
            parameters = {name: parameter for name, (parameter, _) in trained.items()}
            shards = Shards.of(module)
            for _ in range(2):
                stepper.zero_grad()
                module(batch(rank)).square().mean().backward()
                norm = shards.gradient_norm(parameters)
                stepper.step()
            whole = shards.checkpoint(read_checkpoint(2, module, stepper, trained, True))
            found[wrapped, optimizer] = (whole, dict(shards.shapes), float(norm))
    return found


@pytest.fixture(scope="module")
def gathered() -> list[dict[tuple[str, str], Any]]:
    return results(gather)


def train_whole(optimizer: str) -> tuple[nn.Module, Any, float]:
    """The same two steps with the mean over both batches, in one process.

    Each process's batch norm sees its own batch; process 0's buffers are the ones kept.
    """
    module = build()
    stepper = MAKERS[optimizer](p for p in module.parameters() if p.requires_grad)
    norm = 0.0
    for _ in range(2):
        stepper.zero_grad()
        before = {name: b.clone() for name, b in module.named_buffers()}
        (module(batch(1)).square().mean() / 2).backward()
        for name, buffer in module.named_buffers():
            buffer.data.copy_(before[name])
        (module(batch(0)).square().mean() / 2).backward()
        gradients = [p.grad.reshape(-1) for p in module.parameters() if p.grad is not None]
        norm = float(torch.cat(gradients).norm())
        stepper.step()
    return module, stepper, norm


@pytest.mark.parametrize("optimizer", MAKERS)
@pytest.mark.parametrize("wrapped", WRAPS)
def test_checkpoint_is_that_of_the_whole_module(wrapped: str, optimizer: str, gathered) -> None:
    found, shapes, _ = gathered[0][wrapped, optimizer]
    module, stepper, _ = train_whole(optimizer)
    trained = trained_parameters(module, stepper)
    expected = read_checkpoint(2, module, stepper, trained, True)
    assert shapes == {name: p.shape for name, p in module.named_parameters()}
    for kind in ("parameters", "buffers"):
        ours, theirs = getattr(found, kind), getattr(expected, kind)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].device == CPU and type(ours[name]) in (Tensor, nn.Parameter)
            torch.testing.assert_close(ours[name].detach(), tensor.detach())
    assert found.optimizer.keys() == expected.optimizer.keys()
    for name, state in expected.optimizer.items():
        assert found.optimizer[name].keys() == state.keys(), name
        for key, tensor in state.items():
            torch.testing.assert_close(found.optimizer[name][key], tensor)


@pytest.mark.parametrize("wrapped", WRAPS)
def test_norms_of_the_pieces_make_the_norm_of_the_gradient(wrapped: str, gathered) -> None:
    parts = [steps_of([[[0]]], [0.0]) for _ in range(2)]
    for part, each in zip(parts, gathered, strict=True):
        part.gradient_norm.fill_(each[wrapped, "momentum"][2])
    norm = interleaved(parts, sharded=True).gradient_norm
    assert norm.item() == pytest.approx(train_whole("momentum")[2], rel=1e-5)


def test_facts_have_the_whole_shapes() -> None:
    module = nn.ParameterDict({"w": nn.Parameter(torch.zeros(8))})
    optimizers = [torch.optim.SGD(module.parameters(), 0.1)]
    trainer = SimpleNamespace(lightning_module=module, optimizers=optimizers, model=module)
    trained = TrainedParameters(trainer)
    assert trained.facts() == {"w": ParameterFact((8,), "float32", 0)}
    trained.shards = Shards({"w": torch.Size([3, 5])}, {"w": (8, 7)})
    assert trained.facts() == {"w": ParameterFact((3, 5), "float32", 0)}


def test_a_whole_module_has_no_shards() -> None:
    assert Shards.of(build()) is None


def test_names_are_the_users() -> None:
    wrapped = "_fsdp_wrapped_module.a._fsdp_wrapped_module._checkpoint_wrapped_module.0.weight"
    assert plain_name(wrapped) == "a.0.weight"
    assert plain_name("net.0.weight") == "net.0.weight"


def test_joined_parameters_are_refused() -> None:
    def work(rank: int) -> None:
        connect(rank)
        module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
        Shards.of(FullyShardedDataParallel(module, device_id=CPU, use_orig_params=False))

    for outcome in outcomes(work):
        assert isinstance(outcome.error, UnsupportedTrainingError), outcome.trace
        assert "use_orig_params=True" in str(outcome.error)


def test_optimizer_state_of_another_layout_is_refused() -> None:
    def work(rank: int) -> None:
        connect(rank)
        module = wrap_old(build())
        stepper = torch.optim.SGD((p for p in module.parameters() if p.requires_grad), 0.1)
        trained = trained_parameters(module, stepper)
        if rank:
            stepper.state[trained["0.bias"][0]]["rows"] = torch.zeros(99)
        Shards.of(module).checkpoint(read_checkpoint(0, module, stepper, trained, True))

    for outcome in outcomes(work):
        assert isinstance(outcome.error, UnsupportedTrainingError), outcome.trace
        assert "'rows' of 0.bias in 99 elements" in str(outcome.error)


def test_replicas_of_shards_count_once() -> None:
    """Four processes: two replicas, each spread over two."""

    def work(rank: int) -> Any:
        connect(rank, 4)
        mesh = init_device_mesh("cpu", (2, 2))
        module = wrap_old(build(), "HYBRID_SHARD", device_mesh=mesh)
        shards = Shards.of(module)
        module(batch(0)).square().mean().backward()
        stepper = torch.optim.SGD((p for p in module.parameters() if p.requires_grad), 0.1)
        trained = trained_parameters(module, stepper)
        norm = shards.gradient_norm({name: p for name, (p, _) in trained.items()})
        whole = shards.checkpoint(read_checkpoint(0, module, stepper, trained, True))
        return whole, float(norm)

    found = results(work, count=4)
    module = build()
    module(batch(0)).square().mean().backward()
    gradients = [p.grad.reshape(-1) for p in module.parameters() if p.grad is not None]
    norm = sum(each**2 for _, each in found) ** 0.5
    assert norm == pytest.approx(float(torch.cat(gradients).norm()), rel=1e-5)
    for name, parameter in module.named_parameters():
        whole = found[0][0].parameters if parameter.requires_grad else found[0][0].buffers
        torch.testing.assert_close(whole[name], parameter.detach())


# With Lightning.


class Sharding(Plain):
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net[0], mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """The parent's own log cannot join pieces."""


class Sharded(Plain):
    """For a strategy that cuts the module itself."""

    on_before_optimizer_step = Sharding.on_before_optimizer_step


class OnTheCPU(FSDPStrategy):
    """Lightning's FSDPStrategy wants CUDA (see test_gpu.py), torch's FSDP does not."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=CPU, **self.kwargs)


STRATEGIES = {
    "FSDP": (Sharded, lambda: OnTheCPU(auto_wrap_policy={nn.Linear})),
    "FSDP in one piece": (Sharded, lambda: OnTheCPU()),
    "fully_shard": (Sharding, lambda: ModelParallelStrategy(2, 1)),
}


def record_sharded(rank: int, root: Path) -> None:
    options = {"optimizers": adamw, "accumulate_grad_batches": 2}
    for name, (module, strategy) in STRATEGIES.items():
        train(root / name, {"module": module, "strategy": strategy(), **options})
    train(root / "replicated", options)


def test_a_sharded_training_is_recorded_as_a_replicated_one(tmp_path: Path) -> None:
    results(record_sharded, tmp_path)
    expected = open_trajectory(tmp_path / "replicated")
    for name in STRATEGIES:
        assert require_equal(tmp_path / name, tmp_path / "replicated") > 20
        assert open_trajectory(tmp_path / name).facts.parameters == expected.facts.parameters


def test_fsdp_in_a_single_process(tmp_path: Path) -> None:
    def record(rank: int) -> None:
        for name, (module, strategy) in {**STRATEGIES, "one": (Plain, lambda: "auto")}.items():
            if name == "fully_shard":
                continue
            options = {"module": module, "strategy": strategy(), "optimizers": adamw}
            given = {"devices": 1, "use_distributed_sampler": False}
            train(tmp_path / name, options, **given)

    results(record, count=1)
    for name in ("FSDP", "FSDP in one piece"):
        assert require_equal(tmp_path / name, tmp_path / "one") > 20


class Freezes(Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            pl_module.net[0].requires_grad_(False)


@pytest.mark.parametrize(
    ("options", "what", "last"),
    [
        ({"recorder": {"curvature": "online"}}, "curvature='online'", None),
        ({"callbacks": (Freezes(),)}, "freezing and unfreezing in mid-training", 0),
    ],
)
def test_what_needs_whole_parameters_is_refused(
    options: dict[str, Any], what: str, last: int | None, tmp_path: Path
) -> None:
    def work(rank: int) -> None:
        train(
            tmp_path / "run",
            {"module": Sharding, "strategy": STRATEGIES["fully_shard"][1]()},
            **options,
        )

    for outcome in outcomes(work):
        assert isinstance(outcome.error, UnsupportedTrainingError), outcome.trace
        assert what in str(outcome.error) and "strategy='ddp'" in str(outcome.error)
    if last is None:
        assert not (tmp_path / "run").exists()
    else:
        assert open_trajectory(tmp_path / "run").last_step >= last


def test_scoring_by_a_strategy_that_lays_out_the_model_is_refused_before_any_work() -> None:
    run, module, data = train_case(CLASSIFIER, OPTIMIZERS["sgd"], checkpoints=(3,))
    trainer = quiet()
    trainer.strategy.__class__ = ModelParallelStrategy  # needs a GPU to be made in earnest
    attribution = AttributionModule(module, run, TracIn())
    unread = TensorDataset(*data)
    unread.__class__ = type("Unread", (TensorDataset,), {"__getitem__": None})
    with pytest.raises(ValueError, match=r"strategy='ddp'.*devices=1"):
        attribution.attribute(unread, unread, trainer=trainer)


def test_scoring_in_processes_that_end_with_the_pass_is_refused() -> None:
    run, module, data = train_case(CLASSIFIER, OPTIMIZERS["sgd"], checkpoints=(3,))
    trainer = quiet(strategy="ddp_spawn", devices=2)
    with pytest.raises(ValueError, match="ends its processes with each launch"):
        AttributionModule(module, run, TracIn()).attribute(
            TensorDataset(*data), TensorDataset(*data), trainer=trainer
        )
