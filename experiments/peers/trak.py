"""TRAK by traker, with the recorded checkpoints in place of independently trained models."""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from experiments.peers import command
from experiments.peers.recorded import Run, class_losses, open_run, squared_errors
from tda_lightning.runtime.progress import SlowProgress

EXPERIMENT = "queries"
DAMPING = (
    "A number times the mean eigenvalue of the projected gradients' second moments is added to "
    "them (lambda_reg); the default is none, as in traker."
)


def model_output(run: Run) -> Any:
    """What TRAK linearises, f, and minus the derivative of the loss by it.

    Classification: traker's own margin, log p / (1 - p). Language modelling: the same of an
    example's geometric mean probability of a token, p = exp(-mean loss). Regression: the output,
    whose squared error has minus the derivative 2 (target - output).

    Raises:
        ValueError: regression with several outputs, where f would not be one number.
    """
    from trak.modelout_functions import AbstractModelOutput, ImageClassificationModelOutput

    if run.losses is class_losses:
        return ImageClassificationModelOutput()

    class MeanTokenMargin(AbstractModelOutput):
        def __init__(self) -> None: ...

        def get_output(
            self, model: nn.Module, weights: Any, buffers: Any, inputs: Tensor, tokens: Tensor
        ) -> Tensor:
            logits = functional_call(model, (weights, buffers), (inputs[None],))
            loss = run.losses(logits, tokens[None]).sum() / len(tokens)
            return -loss - (-torch.expm1(-loss)).log()

        def get_out_to_loss_grad(
            self, model: nn.Module, weights: Any, buffers: Any, batch: list[Tensor]
        ) -> Tensor:
            logits = functional_call(model, (weights, buffers), (batch[0],))
            losses = run.losses(logits, batch[1]) / batch[1].shape[1]
            return -torch.expm1(-losses).detach()[:, None]

    class Number(AbstractModelOutput):
        def __init__(self) -> None: ...

        def get_output(
            self, model: nn.Module, weights: Any, buffers: Any, inputs: Tensor, target: Tensor
        ) -> Tensor:
            return functional_call(model, (weights, buffers), (inputs[None],)).sum()

        def get_out_to_loss_grad(
            self, model: nn.Module, weights: Any, buffers: Any, batch: list[Tensor]
        ) -> Tensor:
            outputs = functional_call(model, (weights, buffers), (batch[0],))
            return 2 * (batch[1] - outputs).detach().flatten(1)

    if run.losses is not squared_errors:
        return MeanTokenMargin()
    outputs = run.train[0][-1].numel()
    if outputs != 1:
        raise ValueError(f"TRAK of a regression needs one output, this run has {outputs}.")
    return Number()


class Trak:
    """traker told of a run, in float32 with its projector for any device (BasicProjector).

    Args:
        steps: checkpoints that make the ensemble.
        folder: for the files that traker writes.
    """

    def __init__(
        self,
        run: Run,
        steps: list[int],
        folder: Path,
        dimension: int,
        batch_size: int,
        seed: int,
    ) -> None:
        from trak import TRAKer
        from trak.projectors import BasicProjector, ProjectionType

        class KeptProjector(BasicProjector):
            def free_memory(self) -> None:
                # finalize_features lets go of the matrix each time, and it is called repeatedly.
                pass

        self.run, self.steps, self.batch_size = run, steps, batch_size
        projector = KeptProjector(
            grad_dim=sum(p.numel() for p in run.module.parameters()),
            proj_dim=dimension,
            seed=seed,
            proj_type=ProjectionType.normal,
            device=run.device,
        )
        self.traker = TRAKer(
            run.module,
            model_output(run),
            train_set_size=run.num_train,
            save_dir=str(folder),
            device=str(run.device),
            projector=projector,
            proj_dim=dimension,
            logging_level=logging.WARNING,
            use_half_precision=False,
        )

    def project(self) -> None:
        """Projected gradients of every training example and query at every checkpoint."""
        run, traker = self.run, self.traker
        passes = [(step, data) for step in self.steps for data in (run.train, run.query)]
        sizes = [len(run.batches(data, self.batch_size)) for _, data in passes]
        with SlowProgress("TRAK, projected gradients", sum(sizes)) as bar:
            for step in self.steps:
                traker.load_checkpoint(self._state(step), model_id=step)
                for batch in run.batches(run.train, self.batch_size):
                    traker.featurize(batch, num_samples=len(batch[0]))
                    bar.advance()
            # traker projects queries only after this; each damping asked for does it again.
            self._finalize(1.0)
            for step in self.steps:
                state = self._state(step)
                traker.start_scoring_checkpoint(EXPERIMENT, state, step, run.num_query)
                for batch in run.batches(run.query, self.batch_size):
                    traker.score(batch, num_samples=len(batch[0]))
                    bar.advance()

    def score(self, damping: float) -> tuple[Tensor, list[float]]:
        """Scores [query, train], and the lambda_reg of each checkpoint.

        TRAK's score is the effect of an example on the query's f. Times minus the derivative of
        the query's loss by f it is what leaving the example out does to the loss, up to a factor
        that traker drops: it divides the inverse by its mean.
        """
        added = self._finalize(damping)
        found = torch.tensor(self.traker.finalize_scores(EXPERIMENT, self.steps))
        self.run.load(self.run.trajectory.last_step)
        parts = [
            self.traker.gradient_computer.compute_loss_grad(batch)
            for batch in self.run.batches(self.run.query, self.batch_size)
        ]
        return found.T * torch.cat(parts).cpu(), added

    def _state(self, step: int) -> dict[str, Tensor]:
        self.run.load(step)
        return self.run.module.state_dict()

    def _finalize(self, damping: float) -> list[float]:
        traker = self.traker
        added = []
        for step in self.steps:
            traker.saver.load_current_store(step)
            gradients = torch.as_tensor(traker.saver.current_store["grads"])
            # The mean eigenvalue of a matrix is its trace over its dimension.
            mean = float(gradients.double().square().sum()) / gradients.shape[1]
            added.append(damping * mean)
            traker.saver.model_ids[step]["is_finalized"] = 0
            traker.score_computer.lambda_reg = added[-1]
            traker.finalize_features([step])
        return added


def projection_dimension(asked: int | None, num_train: int) -> int:
    """traker's own 2048, or half the training examples where these are fewer than twice that.

    Raises:
        ValueError: more dimensions than examples, whose second moments have no inverse.
    """
    if asked is None:
        return min(2048, num_train // 2)
    if not 1 <= asked <= num_train:
        raise ValueError(
            f"--projection-dimension must be between 1 and the number of training examples, "
            f"{num_train}, got {asked}: the second moments of the projected gradients are inverted."
        )
    return asked


def main() -> None:
    parser = command.parser("trak", __doc__, DAMPING)
    parser.add_argument(
        "--checkpoints",
        choices=("all", "last"),
        default="all",
        help="the ensemble: all recorded checkpoints after the initial weights, or the last alone",
    )
    parser.add_argument(
        "--projection-dimension",
        type=int,
        metavar="P",
        help="by default 2048, or half the number of training examples where that is less",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the projection")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    files = command.start(arguments)
    write(arguments, files, open_run(arguments.run, arguments.data_root, arguments.device))


def write(arguments: argparse.Namespace, files: dict[str, Path], run: Run) -> None:
    """Compute and save the scores of every damping."""
    dimension = projection_dimension(arguments.projection_dimension, run.num_train)
    steps = run.steps if arguments.checkpoints == "all" else run.steps[-1:]
    with tempfile.TemporaryDirectory() as folder:
        began = command.Seconds.now()
        trak = Trak(run, steps, Path(folder), dimension, arguments.batch_size, arguments.seed)
        trak.project()
        projected = began.passed()
        for text, file in files.items():
            damping = 0.0 if text == command.DEFAULT else float(text)
            began = command.Seconds.now()
            values, added = trak.score(damping)
            seconds = projected.and_also(began.passed())
            settings = {
                "projection_dimension": dimension,
                "projector": "BasicProjector, normal, float32",
                "damping": damping,
                "lambda_reg": added,
                "checkpoints": steps,
                "model_output": type(trak.traker.task).__name__,
                "batch_size": arguments.batch_size,
                "seed": arguments.seed,
            }
            name = f"TRAK, {len(steps)} checkpoint{'s' * (len(steps) > 1)} of one run"
            notes = ["The scale of the scores means nothing: traker drops it."]
            command.save(arguments, file, run, values, "traker", name, seconds, settings, notes)


if __name__ == "__main__":
    main()
