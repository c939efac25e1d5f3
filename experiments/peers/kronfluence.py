"""EK-FAC influence at the last checkpoint by kronfluence: factors once, scores for each damping."""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.peers import command
from experiments.peers.recorded import Run, open_run

DAMPING = (
    "A number is added to the curvature of the loss as trained; the default is kronfluence's "
    "heuristic, 0.1 times the mean eigenvalue of each layer."
)


class Influence:
    """kronfluence told of a run, as its documentation describes: all examples, no low-rank queries.

    https://github.com/pomonam/kronfluence/blob/main/DOCUMENTATION.md

    Args:
        run: its module is changed for good: kronfluence wraps layers in place.
        folder: for the files that kronfluence writes.
    """

    def __init__(self, run: Run, folder: Path, batch_size: int, empirical: bool) -> None:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.task import Task

        class Told(Task):
            def compute_train_loss(
                self, batch: Any, model: nn.Module, sample: bool = False
            ) -> Tensor:
                outputs = model(*batch[:-1])
                targets = run.draw(outputs.detach()) if sample else batch[-1]
                return run.losses(outputs, targets).sum()

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return self.compute_train_loss(batch, model)

        task = Told()
        self.run, self.batch_size, self.empirical = run, batch_size, empirical
        self.analyzer = Analyzer(
            "run",
            prepare_model(run.module, task),
            task,
            cpu=run.device.type == "cpu",
            output_dir=str(folder),
        )

    def fit(self) -> None:
        """Covariances, eigenvectors and corrected eigenvalues."""
        from kronfluence.arguments import FactorArguments

        # As many examples as there are, where kronfluence would stop at 100,000.
        told = FactorArguments(
            "ekfac",
            use_empirical_fisher=self.empirical,
            covariance_max_examples=None,
            lambda_max_examples=None,
        )
        self.analyzer.fit_all_factors(
            "ekfac",
            self.run.train,
            per_device_batch_size=self.batch_size,
            factor_args=told,
            overwrite_output_dir=True,
        )

    def score(self, damping: float | None) -> Tensor:
        """Scores [query, train] in our unit.

        kronfluence adds neither weight decay nor 1/N. Told c times the loss it has c grad m and
        c grad l; c H as the Fisher of labels drawn from the model, which is the Gauss-Newton matrix
        of what it is told, and c c H as the empirical Fisher, which is made of gradients.
        """
        from kronfluence.arguments import ScoreArguments

        run = self.run
        told = None if damping is None else self.curvature_scale * damping
        self.analyzer.compute_pairwise_scores(
            "scores",
            "ekfac",
            run.query,
            run.train,
            per_device_query_batch_size=min(self.batch_size, run.num_query),
            per_device_train_batch_size=self.batch_size,
            score_args=ScoreArguments(damping_factor=told),
            overwrite_output_dir=True,
        )
        found = self.analyzer.load_pairwise_scores("scores")["all_modules"]
        return found * self.curvature_scale / (run.scale**2 * run.num_train)

    @property
    def curvature_scale(self) -> float:
        """kronfluence's curvature over that of the loss as trained; its damping over ours."""
        return self.run.scale**2 if self.empirical else self.run.scale


def left_out(module: nn.Module) -> list[str]:
    """Names of the parameters that kronfluence does not see, before it wraps the module."""
    layers = [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    seen = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
    return [name for name, p in module.named_parameters() if id(p) not in seen]


def _notes(run: Run) -> list[str]:
    notes = ["No weight decay is added to the curvature."]
    if names := left_out(run.module):
        sizes = {name: p.numel() for name, p in run.module.named_parameters()}
        share = sum(sizes[name] for name in names) / sum(sizes.values())
        notes.append(f"Left out, {share:.1%} of the weights: {', '.join(names)}.")
    names = [name for name, _ in run.module.named_parameters(remove_duplicate=False)]
    if len(names) > len(list(run.module.parameters())):
        notes.append("Of a tied weight only its use in a linear layer counts.")
    return notes


def main() -> None:
    parser = command.parser("kronfluence", __doc__, DAMPING)
    parser.add_argument("--empirical", action="store_true", help="Fisher of the true labels")
    parser.add_argument("--seed", type=int, default=0, help="of the labels that are sampled")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    files = command.start(arguments)
    write(arguments, files, open_run(arguments.run, arguments.data_root, arguments.device))


def write(arguments: argparse.Namespace, files: dict[str, Path], run: Run) -> None:
    """Compute and save the scores of every damping."""
    notes = _notes(run)
    torch.manual_seed(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        began = command.Seconds.now()
        influence = Influence(run, Path(folder), arguments.batch_size, arguments.empirical)
        influence.fit()
        fitted = began.passed()
        for text, file in files.items():
            damping = None if text == command.DEFAULT else float(text)
            began = command.Seconds.now()
            values = influence.score(damping)
            scored = began.passed()
            settings = {
                "strategy": "ekfac",
                "damping": "0.1 x mean eigenvalue" if damping is None else damping,
                "damping_factor": None if damping is None else influence.curvature_scale * damping,
                "fisher": "empirical" if arguments.empirical else "true (sampled labels)",
                "loss_over_trained_loss": run.scale,
                "batch_size": arguments.batch_size,
                "seed": arguments.seed,
                "seconds_of_factors": fitted.wall,
                "seconds_of_scores": scored.wall,
            }
            name = "kronfluence EK-FAC"
            command.save(
                arguments,
                file,
                run,
                values,
                "kronfluence",
                name,
                fitted.and_also(scored),
                settings,
                notes,
            )


if __name__ == "__main__":
    main()
