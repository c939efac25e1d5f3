"""One function for each measured job: set up what may be set up, and return the timed work.

Every job starts from the same recorded trajectory and the same data sets in memory, runs on the
CPU in float32 with the same batch size, and ends with the scores [query, train] in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from experiments.benchmark.works import Classifier, Work
from tda_lightning import AttributionModule, Trajectory, TrajectoryRecorder
from tda_lightning.estimators import (
    TRAK,
    FastInfluence,
    InfluenceFunction,
    Source,
    TracIn,
    Unrolled,
)
from tda_lightning.tasks import AttributionTask, ClassificationTask

Job = Callable[[], Tensor]
DIMENSION = 512  # of TRAK's projection
TRAK_BATCH, DATTRI_BATCH = 100, 100


class _EmpiricalTask(AttributionTask):
    """Cross entropy without sampled labels: curvature is the empirical Fisher."""

    def train_loss(self, module: nn.Module, batch: Any) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(module(inputs), labels, reduction="none")


def _ours(
    work: Work, folder: Path, estimator: Any, self_influence: bool, empirical: bool = False
) -> Job:
    train, query = work.data()
    module = Classifier(work.network())
    task = _EmpiricalTask() if empirical else ClassificationTask()

    def job() -> Tensor:
        attribution = AttributionModule(module, str(folder), estimator, task)
        return attribution.attribute(
            train, query, batch_size=work.batch_size, self_influence=self_influence
        ).values

    return job


def ekfac_tda_lightning(work: Work, folder: Path) -> Job:
    return _ours(work, folder, InfluenceFunction(curvature="ekfac"), self_influence=False)


def ekfac_self_tda_lightning(work: Work, folder: Path) -> Job:
    return _ours(work, folder, InfluenceFunction(curvature="ekfac"), self_influence=True)


def empirical_tda_lightning(work: Work, folder: Path) -> Job:
    estimator = InfluenceFunction(curvature="ekfac")
    return _ours(work, folder, estimator, self_influence=False, empirical=True)


def tracin_tda_lightning(work: Work, folder: Path) -> Job:
    return _ours(work, folder, TracIn(), self_influence=False)


def tracin_self_tda_lightning(work: Work, folder: Path) -> Job:
    return _ours(work, folder, TracIn(), self_influence=True)


def source_tda_lightning(work: Work, folder: Path) -> Job:
    return _ours(work, folder, Source(num_segments=3), self_influence=False)


def source_blocks_tda_lightning(work: Work, folder: Path) -> Job:
    estimator = Source(num_segments=3, leading_directions=0)
    return _ours(work, folder, estimator, self_influence=False)


def source_self_tda_lightning(work: Work, folder: Path) -> Job:
    return _ours(work, folder, Source(num_segments=3), self_influence=True)


def _weights(folder: Path, step: int) -> dict[str, Tensor]:
    """The bare network's state at a recorded step."""
    parameters = Trajectory.load(str(folder)).checkpoints[step].parameters
    return {name.removeprefix("network."): value for name, value in parameters.items()}


def _kronfluence(work: Work, folder: Path, self_influence: bool, empirical: bool = False) -> Job:
    """Exact EK-FAC as documented: no low-rank queries, float32, one partition.

    https://github.com/pomonam/kronfluence/blob/main/DOCUMENTATION.md
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            inputs, labels = batch
            logits = model(inputs)
            if sample:
                with torch.no_grad():
                    labels = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
            return F.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    train, query = work.data()
    network = work.network()
    network.load_state_dict(_weights(folder, Trajectory.load(str(folder)).last_step))
    task = Classification()
    network = prepare_model(network, task)
    # The documented heuristic: damping of 0.1 times the mean eigenvalue, as ours by default.
    scoring = ScoreArguments(damping_factor=None)

    def job() -> Tensor:
        with tempfile.TemporaryDirectory() as output:
            analyzer = Analyzer(
                "benchmark", network, task, cpu=True, output_dir=output, disable_tqdm=True
            )
            analyzer.fit_all_factors(
                "ekfac",
                train,
                per_device_batch_size=work.batch_size,
                factor_args=FactorArguments("ekfac", use_empirical_fisher=empirical),
            )
            analyzer.compute_pairwise_scores(
                "scores",
                "ekfac",
                query,
                train,
                per_device_query_batch_size=work.batch_size,
                per_device_train_batch_size=work.batch_size,
                score_args=scoring,
            )
            scores = analyzer.load_pairwise_scores("scores")["all_modules"]
            if self_influence:
                analyzer.compute_self_scores(
                    "self",
                    "ekfac",
                    train,
                    per_device_train_batch_size=work.batch_size,
                    score_args=scoring,
                )
            return scores / work.num_train

    return job


def ekfac_kronfluence(work: Work, folder: Path) -> Job:
    return _kronfluence(work, folder, self_influence=False)


def ekfac_self_kronfluence(work: Work, folder: Path) -> Job:
    return _kronfluence(work, folder, self_influence=True)


def empirical_kronfluence(work: Work, folder: Path) -> Job:
    return _kronfluence(work, folder, self_influence=False, empirical=True)


def tracin_captum(work: Work, folder: Path) -> Job:
    """TracInCP over all layers with per-example gradients by batch, the faster of its two ways."""
    from captum.influence import TracInCP

    train, query = work.data()
    network = work.network().eval()
    recorded = sorted(step for step in Trajectory.load(str(folder)).checkpoints if step > 0)

    def load(module: nn.Module, step: str) -> float:
        module.load_state_dict(_weights(folder, int(step)))
        # captum multiplies by the learning rate as the paper does. Ours weighs a checkpoint by the
        # rates of the steps since the one before: here equal, so only a factor.
        return 1.0

    def job() -> Tensor:
        tracin = TracInCP(
            network,
            train,
            [str(step) for step in recorded],
            checkpoints_load_func=load,
            loss_fn=nn.CrossEntropyLoss(reduction="sum"),
            batch_size=work.batch_size,
            sample_wise_grads_per_batch=True,
        )
        return tracin.influence(query.tensors)

    return job


def _floor(work: Work, folder: Path, steps: Sequence[int]) -> Job:
    """What no method that compares every example with every query goes without: a forward and a
    backward pass over the training set at each checkpoint, and one dense product of the queries
    with the examples' gradients."""
    train, _ = work.data()
    network = work.network().eval()
    size = sum(parameter.numel() for parameter in network.parameters())
    queries = torch.randn(work.num_query, size)
    gradients = torch.randn(min(work.batch_size, work.num_train), size)

    def job() -> Tensor:
        scores = torch.zeros(work.num_query, work.num_train)
        for step in steps:
            network.load_state_dict(_weights(folder, step))
            for start in range(0, work.num_train, work.batch_size):
                rows = slice(start, start + work.batch_size)
                inputs, labels = train[rows]
                network.zero_grad()
                F.cross_entropy(network(inputs), labels, reduction="sum").backward()
                scores[:, rows] += queries @ gradients[: len(labels)].T
        return scores

    return job


def floor_of_one(work: Work, folder: Path) -> Job:
    return _floor(work, folder, [Trajectory.load(str(folder)).last_step])


def floor_of_all(work: Work, folder: Path) -> Job:
    recorded = sorted(step for step in Trajectory.load(str(folder)).checkpoints if step > 0)
    return _floor(work, folder, recorded)


def unrolled_tda_lightning(work: Work, folder: Path) -> Job:
    return _ours(work, folder, Unrolled(), self_influence=False)


def fastif_tda_lightning(work: Work, folder: Path) -> Job:
    return _ours(work, folder, FastInfluence(), self_influence=False)


def trak_tda_lightning(work: Work, folder: Path) -> Job:
    estimator = TRAK(projection_dimension=_dimension(work))
    return _ours(work, folder, estimator, self_influence=False)


def _dimension(work: Work) -> int:
    """Of TRAK's projection: in a trial fewer, which its training examples determine."""
    return min(DIMENSION, work.num_train // 2)


def trak_traker(work: Work, folder: Path) -> Job:
    """One checkpoint, with the projector for any device, in float32."""
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    train, query = work.data()
    network = work.network().eval()
    state = _weights(folder, Trajectory.load(str(folder)).last_step)
    size = sum(parameter.numel() for parameter in network.parameters())

    def opened(output: str) -> TRAKer:
        projector = BasicProjector(size, _dimension(work), 0, ProjectionType.normal, "cpu")
        return TRAKer(
            network, "image_classification", work.num_train, save_dir=output, device="cpu",
            projector=projector, proj_dim=_dimension(work), use_half_precision=False,
        )  # fmt: skip

    def job() -> Tensor:
        with tempfile.TemporaryDirectory() as output:
            traker = opened(output)
            traker.load_checkpoint(state, model_id=0)
            for start in range(0, work.num_train, TRAK_BATCH):
                batch = train[start : start + TRAK_BATCH]
                traker.featurize(batch, num_samples=len(batch[1]))
            traker.finalize_features()
            traker = opened(output)  # finalizing lets go of the projection, which scoring needs
            traker.start_scoring_checkpoint("scores", state, model_id=0, num_targets=len(query))
            for start in range(0, len(query), TRAK_BATCH):
                batch = query[start : start + TRAK_BATCH]
                traker.score(batch, num_samples=len(batch[1]))
            return torch.as_tensor(traker.finalize_scores("scores")).T

    return job


def tracin_dattri(work: Work, folder: Path) -> Job:
    """TracIn over all parameters and the same checkpoints, without projection."""
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask as DattriTask
    from torch.func import functional_call

    train, query = work.data()
    network = work.network().eval()
    recorded = sorted(step for step in Trajectory.load(str(folder)).checkpoints if step > 0)

    def loss(parameters: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        image, label = data
        outputs = functional_call(network, parameters, (image[None],))
        return F.cross_entropy(outputs, label[None])

    def job() -> Tensor:
        task = DattriTask(loss, network, [_weights(folder, step) for step in recorded])
        weights = torch.ones(len(recorded))
        attributor = TracInAttributor(task, weights, normalized_grad=False, device="cpu")
        attributor.projector_kwargs = None
        # Every gradient is dense: larger batches do not fit into memory.
        loaders = (DataLoader(data, DATTRI_BATCH) for data in (train, query))
        return attributor.attribute(*loaders).T

    return job


def _trained(work: Work, recorder: dict[str, Any] | None) -> Job:
    """Thirty steps by Lightning's trainer, with or without a recorder."""
    train, _ = work.data()
    module = Classifier(work.network())
    loader = DataLoader(train, min(work.batch_size, work.num_train // 4), shuffle=True)

    def job() -> Tensor:
        with tempfile.TemporaryDirectory() as output:
            callbacks = []
            if recorder is not None:
                callbacks = [TrajectoryRecorder(f"{output}/run", num_checkpoints=3, **recorder)]
            trainer = Trainer(
                max_steps=30, accelerator="cpu", logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
            )  # fmt: skip
            trainer.fit(module, loader)
        return torch.zeros(1)

    return job


def training(work: Work, folder: Path) -> Job:
    return _trained(work, None)


def training_recorded(work: Work, folder: Path) -> Job:
    return _trained(work, {})


def training_online(work: Work, folder: Path) -> Job:
    return _trained(work, {"curvature": "online"})


JOBS: dict[tuple[str, str], Callable[[Work, Path], Job]] = {
    ("ekfac", "tda-lightning"): ekfac_tda_lightning,
    ("ekfac", "kronfluence"): ekfac_kronfluence,
    ("ekfac+self", "tda-lightning"): ekfac_self_tda_lightning,
    ("ekfac+self", "kronfluence"): ekfac_self_kronfluence,
    ("empirical", "tda-lightning"): empirical_tda_lightning,
    ("empirical", "kronfluence"): empirical_kronfluence,
    ("tracin", "tda-lightning"): tracin_tda_lightning,
    ("tracin", "captum"): tracin_captum,
    ("ekfac", "floor"): floor_of_one,
    ("tracin", "floor"): floor_of_all,
    ("tracin+self", "tda-lightning"): tracin_self_tda_lightning,
    ("source blocks", "floor"): floor_of_all,
    ("source blocks", "tda-lightning"): source_blocks_tda_lightning,
    ("source", "tda-lightning"): source_tda_lightning,
    ("source+self", "tda-lightning"): source_self_tda_lightning,
    ("unrolled", "tda-lightning"): unrolled_tda_lightning,
    ("fastif", "tda-lightning"): fastif_tda_lightning,
    ("trak", "tda-lightning"): trak_tda_lightning,
    ("trak", "traker"): trak_traker,
    ("tracin", "dattri"): tracin_dattri,
    ("training", "lightning"): training,
    ("training", "checkpoints"): training_recorded,
    ("training", "online curvature"): training_online,
}
