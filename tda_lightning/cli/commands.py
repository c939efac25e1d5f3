"""What each command does, given its configuration."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import RichProgressBar
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from tda_lightning.attribution.matching import require_same_data
from tda_lightning.attribution.module import AttributionModule
from tda_lightning.cli.ground_truth import file_name, ground_truth
from tda_lightning.cli.inspect_table import description_table
from tda_lightning.cli.judged import (
    Judged,
    how_judged,
    judge,
    judged_json,
    judged_table,
    require_measurements,
    wrong_labels,
)
from tda_lightning.cli.kept import which_part
from tda_lightning.cli.proximal import settle_response
from tda_lightning.cli.recorded import FILE_NAME as RECORDED
from tda_lightning.cli.recorded import build, command_line, load_config, save_config
from tda_lightning.cli.removal import (
    about_removal,
    removal_file,
    removal_json,
    removal_table,
    remove_proponents,
)
from tda_lightning.cli.retraining import Parts
from tda_lightning.cli.smooth import landing, smoothness_table
from tda_lightning.cli.trust import quiet_trainer, trust
from tda_lightning.estimators import Source, TracIn
from tda_lightning.evaluation import smoothness
from tda_lightning.evaluation.baselines import (
    BASELINES,
    last_checkpoint,
    last_layer_cosine,
    random_scores,
    self_loss,
)
from tda_lightning.examples.data import DataModule
from tda_lightning.records.errors import (
    NonFiniteError,
    TrajectoryFormatError,
    TrajectoryMismatchError,
    UnsupportedTrainingError,
)
from tda_lightning.records.ground_truth import PROTOCOLS
from tda_lightning.records.plans import AttributionPlan, comparison
from tda_lightning.records.scores import Scores
from tda_lightning.records.trajectory import Trajectory
from tda_lightning.report import write_report
from tda_lightning.store.atomic_write import write_text
from tda_lightning.store.inspect import describe
from tda_lightning.store.layout import FACTS_FILE, GROUND_TRUTH_FOLDER
from tda_lightning.store.scores_file import replace_provenance

Command = Callable[[DictConfig], None]
# Retrained models: enough to tell estimators apart, and enough to see whether one can be trusted.
_SUBSETS, _SPOT_CHECK = 30, 8


def clear_errors(command: Command) -> Command:
    """Report a failure by its message; HYDRA_FULL_ERROR=1 shows where it happened."""

    @functools.wraps(command)
    def run(config: DictConfig) -> None:
        quiet_lightning()
        if config.get("threads"):
            torch.set_num_threads(config.threads)
        try:
            command(config)
        except CompactHydraException as error:
            # Hydra wraps what a constructor raised; the reason is what a reader needs.
            reason = error.__cause__ or error
            raise CompactHydraException(f"tda {command.__name__}: {reason}") from error
        except (
            ArithmeticError,
            ImportError,
            IndexError,
            OSError,
            OmegaConfBaseException,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            raise CompactHydraException(f"tda {command.__name__}: {error}") from error

    return run


@clear_errors
def train(config: DictConfig) -> None:
    """Train a model from scratch and record its trajectory."""
    config.output = str(_output_folder(config))
    data = instantiate(config.data, _convert_="all")
    data.setup()  # missing files are found before anything is written
    seed_everything(config.seed, workers=True, verbose=False)
    module = instantiate(config.model, _convert_="all")
    recorder = instantiate(config.recorder, _convert_="all")
    trainer = _trainer(config.trainer, [recorder, SaveConfig(config)])
    try:
        trainer.fit(module, datamodule=data)
    except (KeyboardInterrupt, SystemExit):
        # Lightning leaves without a word.
        print(
            f"Interrupted after {trainer.global_step} steps. What is recorded in {config.output} "
            "can be inspected and attributed.",
            file=sys.stderr,
        )
        raise
    measured = "".join(
        f", {name} {float(value):.4g}" for name, value in sorted(trainer.callback_metrics.items())
    )
    print(f"Recorded {trainer.global_step} steps in {config.output}{measured}")


@clear_errors
def attribute(config: DictConfig) -> None:
    """Score the recorded training examples for the recorded queries."""
    folder = Path(_required(config, "trajectory", "tda attribute trajectory=FOLDER"))
    target = Path(config.scores or folder / "scores" / f"{_estimator_name()}.h5")
    _require_solvable(config)
    trajectory = Trajectory.load(str(folder))
    recorded = load_config(folder)
    if target.exists() and not config.overwrite:  # known before anything is loaded
        raise FileExistsError(
            f"{target} already holds scores, which are kept. Choose another file with "
            "scores=FILE, or replace it with overwrite=true."
        )
    data, module, task = _recorded_parts(config, recorded)
    attribution = AttributionModule(
        module,
        trajectory=trajectory,
        estimator=instantiate(config.estimator, _convert_="all"),
        task=task,
    )
    try:
        scores = attribution.attribute(
            train=data.train_dataset,
            query=data.query_dataset,
            batch_size=config.batch_size,
            trainer=_trainer(config.trainer, [], None),
            scores_path=str(target),
            self_influence=config.self_influence,
            overwrite=config.overwrite,
            provenance=_provenance(config, _predictions(module, data, trajectory)),
        )
    except (KeyboardInterrupt, SystemExit):
        # Lightning leaves without a word.
        goes_on = " The same command goes on from what was kept." if trajectory.unfinished else ""
        print(f"Interrupted: {target} is not written.{goes_on}", file=sys.stderr)
        raise
    print(f"Scored {scores.num_train} training examples for {scores.num_queries} queries: {target}")


@clear_errors
def plan(config: DictConfig) -> None:
    """Show how long and how large attributions of a trajectory will be on this machine."""
    folder = Path(_required(config, "trajectory", "tda plan trajectory=FOLDER"))
    trajectory = Trajectory.load(str(folder))
    data, module, task = _recorded_parts(config, load_config(folder))
    trainer = _trainer(config.trainer, [], None)
    one = {} if "estimator" not in config else {_estimator_name(): config.estimator}
    if one:
        _require_solvable(config)
    plans: dict[str, AttributionPlan | str] = {}
    for name, node in (one or config.estimators).items():
        attribution = AttributionModule(
            module, trajectory, instantiate(node, _convert_="all"), task
        )
        try:
            plans[str(name)] = attribution.plan(
                train=data.train_dataset,
                query=data.query_dataset,
                batch_size=config.batch_size,
                trainer=trainer,
                self_influence=config.self_influence,
            )
        except (UnsupportedTrainingError, ValueError) as error:
            if one:
                raise
            plans[str(name)] = str(error)
    console = Console()
    console.print(*plans.values() if one else [comparison(plans)])


@clear_errors
def plan_recording(config: DictConfig) -> None:
    """Show how much disk and memory the recording of a training run will take."""
    config.output = str(_output_folder(config))
    data = instantiate(config.data, _convert_="all")
    module = instantiate(config.model, _convert_="all")
    recorder = instantiate(config.recorder, _convert_="all")
    Console().print(recorder.plan(module, _trainer(config.trainer, [recorder], None), data))


@clear_errors
def check(config: DictConfig) -> None:
    """Show whether gradients are exact, the run can be replayed, and derivatives can be trusted."""
    folder = Path(_required(config, "trajectory", "tda check trajectory=FOLDER"))
    trajectory = Trajectory.load(str(folder))
    data, module, task = _recorded_parts(config, load_config(folder))
    module.to(_replay_device(config.device, trajectory))
    train, query = data.train_dataset, data.query_dataset
    AttributionModule(module, trajectory, Source(), task).check(train, query, config.examples)
    try:
        require_same_data(trajectory, train)
        found = smoothness(
            trajectory,
            module,
            task,
            train,
            query,
            directions=config.directions,
            fraction=config.fraction,
            share=config.share,
            seed=config.seed,
            batch_size=config.batch_size,
            together=config.together,
        )
    except (NonFiniteError, UnsupportedTrainingError) as error:
        raise type(error)(
            f"{error} Whether the run is smooth is therefore not known; Source in the averaged "
            "order, influence functions and TracIn need no replay."
        ) from error
    console = Console()
    console.print(landing(found.landing_error), smoothness_table(found), found.advice, sep="\n")


@clear_errors
def evaluate(config: DictConfig) -> None:
    """Show how well scores predict retraining, which is kept beside the trajectory."""
    began = time.monotonic()
    folder = Path(_required(config, "trajectory", "tda evaluate trajectory=FOLDER scores=FILE"))
    files = _score_files(config, folder)
    scores = {path.stem: Scores.load(path) for path in files}
    if config.spot_check and not scores:
        raise ValueError(
            "A spot check is kept in the scores' files, and there are none. For example: tda "
            "evaluate trajectory=FOLDER scores=FILE spot_check=true"
        )
    if config.protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be among {', '.join(PROTOCOLS)}, got {config.protocol}.")
    if config.removal is not None and not scores:
        raise ValueError("removal leaves out the proponents that scores name, and there are none.")
    which_part(config.part)  # known to be one before anything is loaded
    settle_response(config, scores)
    if config.num_subsets is None:
        config.num_subsets = _SPOT_CHECK if config.spot_check else _SUBSETS
    for name in config.baselines:
        if name not in BASELINES:
            raise ValueError(f"baselines must be among {', '.join(BASELINES)}, got {name}.")
    asked = _settings_of(_settings_of(_first_provenance(scores), "config"), "data")
    # The queries are those that were scored, which may be fewer than were recorded.
    config.data = {**config.data, **_given(asked), **_given(config.data)}
    parts = parts_to_retrain(config)
    require_same_data(parts.trajectory, parts.data.train_dataset)
    kept = folder / GROUND_TRUTH_FOLDER / f"{file_name(config)}.h5"
    path = Path(config.ground_truth or kept)
    shape = (len(parts.data.query_dataset), len(parts.data.train_dataset))
    for file, found in scores.items():  # known before hours of retraining
        if found.values.shape != shape:
            raise TrajectoryMismatchError(
                f"The scores {file} are of {found.num_queries} queries and {found.num_train} "
                f"training examples; the data of this run have {shape[0]} and {shape[1]}. Give "
                "scores of this run, with the data settings of their attribution."
            )
    _check_removal(config, shape[1])
    truth = ground_truth(parts, path)
    for file, found in scores.items():
        require_measurements(file, found, truth)
    removed = {}
    if config.removal is not None:
        removed = remove_proponents(parts, scores, removal_file(parts, path))
    if config.part is not None:
        print(
            f"Part {config.part} of the retrainings is done and kept in {path.parent}. When all "
            "parts are, the same command without part= takes them up and judges."
        )
        return
    wrong = wrong_labels(parts.data)
    rows = [judge(name, found, truth, wrong) for name, found in scores.items()]
    compared = dict(scores)
    for name in config.baselines:
        started = time.monotonic()
        try:
            made = _baseline(name, parts)
        except (UnsupportedTrainingError, ValueError) as error:
            rows.append(Judged(name, "baseline", reason=f"not possible: {error}"))
            continue
        rows.append(judge(name, made, truth, wrong, time.monotonic() - started))
        if name == "gradient_dot":  # the one of them that a single file of scores may resemble
            compared.setdefault(name, made)
    seconds = time.monotonic() - began
    output = Path(config.output or path.with_suffix(".json"))
    about: dict[str, Any] = {
        "command": command_line(),
        "versions": versions(),
        "trajectory": str(folder),
        "ground_truth": str(path),
        "scores": [str(file) for file in files],
    }
    if config.protocol == "pbrf":
        about["damping"] = config.damping
    table = judged_json(rows, truth, seconds, about)
    if removed:
        table["removal"] = removal_json(removed)
    write_text(output, json.dumps(table, indent=1))
    if config.spot_check:
        for kept_in, row in zip(files, rows, strict=False):
            known = scores[row.name].provenance
            found_out = trust(row, compared, truth, parts, command_line())
            replace_provenance(kept_in, {**known, "trust": found_out})
    Console().print(
        judged_table(rows, truth.protocol), *([removal_table(removed)] if removed else [])
    )
    if removed:
        print(about_removal(config.protocol))
    print(how_judged(rows, truth, seconds), f"Ground truth: {path}", f"Table: {output}", sep="\n")
    if config.spot_check:
        print(f"Kept in the provenance of {', '.join(map(str, files))}")


@clear_errors
def report(config: DictConfig) -> None:
    """Make an HTML page that shows a file of scores."""
    source = Path(_required(config, "scores", "tda report scores=FILE"))
    scores = Scores.load(source)
    folder = _scored_trajectory(config, source, scores.provenance)
    trajectory = None if folder is None else Trajectory.load(str(folder))
    shown: dict[str, Any] = {}
    if folder is not None and (folder / RECORDED).is_file():
        # The queries are those of the attribution, which may have asked for fewer or others.
        asked = _settings_of(_settings_of(scores.provenance, "config"), "data")
        changes = {**_given(asked), **_given(config.data)}
        data = build(load_config(folder).data, config.trust_config, **changes)
        shown = {
            "train": data.train_dataset,
            "query": data.query_dataset,
            "render": data.render,
        }
    path = write_report(
        scores,
        config.output or source.with_suffix(".html"),
        trajectory=trajectory,
        queries=None if config.queries is None else list(config.queries),
        k=config.k,
        num_suspects=config.num_suspects,
        title=config.title,
        **shown,
    )
    print(f"Report: {path}")


@clear_errors
def inspect(config: DictConfig) -> None:
    """Show what is in a trajectory; fail when it is not whole."""
    found = describe(_required(config, "trajectory", "tda inspect FOLDER"))
    Console().print(description_table(found))
    if count := len(found.problems):
        raise TrajectoryFormatError(
            f"{found.path} is not whole: {count} problem{'s' * (count > 1)}, listed above."
        )


class SaveConfig(Callback):
    """Writes the configuration beside the trajectory once the recorder has taken the folder."""

    def __init__(self, config: DictConfig) -> None:
        self.config = config

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            Path(self.config.output).mkdir(parents=True, exist_ok=True)
            save_config(self.config, self.config.output, versions())


def _recorded_parts(
    config: DictConfig, recorded: DictConfig
) -> tuple[DataModule, LightningModule, Any]:
    """Data, module and task of a recorded run, with the changes that the command asks for."""
    data = build(recorded.data, config.trust_config, **_given(config.data))
    # The trajectory has the weights: nothing here is going to train.
    changes = {**config.get("model", {}), "optimizer": None, "scheduler": None}
    module = build(recorded.model, config.trust_config, **changes)
    task = (
        instantiate(config.task, _convert_="all")
        if "task" in config
        else build(recorded.get("task"), config.trust_config)
    )
    return data, module, task


def parts_to_retrain(config: DictConfig) -> Parts:
    """A recorded run with everything that retraining it takes."""
    folder = Path(config.trajectory)
    trajectory, recorded = Trajectory.load(str(folder)), load_config(folder)
    data, module, task = _recorded_parts(config, recorded)
    module.to(_replay_device(config.device, trajectory))
    return Parts(trajectory, data, module, task, recorded, config)


def _score_files(config: DictConfig, folder: Path) -> list[Path]:
    """The files of scores to judge."""
    given = config.scores
    if given is None:
        found = sorted((folder / "scores").glob("*.h5"))
        if not found and not config.baselines:
            raise ValueError(
                f"Expected scores, got none, and there are none in {folder / 'scores'}. For "
                "example: tda evaluate trajectory=FOLDER scores=FILE"
            )
        return found
    files = [Path(given)] if isinstance(given, str) else [Path(file) for file in given]
    if len({file.stem for file in files}) < len(files):
        raise ValueError(f"Scores must have different names, got {', '.join(map(str, files))}.")
    return files


def _check_removal(config: DictConfig, num_train: int) -> None:
    """Refuse impossible numbers of proponents before any retraining begins."""
    given = config.removal
    if given is None:
        return
    counts = OmegaConf.is_list(given) and all(isinstance(k, int) for k in given)
    if not counts or not given or min(given) < 1 or max(given) >= num_train:
        raise ValueError(
            f"removal must be a list of numbers from 1 to {num_train - 1}, such as "
            f"removal=[10,50]; got {given}."
        )


def _first_provenance(scores: Mapping[str, Scores]) -> Mapping[str, Any]:
    return next(iter(scores.values())).provenance if scores else {}


def _baseline(name: str, parts: Parts) -> Scores:
    """Scores that cost almost nothing."""
    train, query, size = parts.data.train_dataset, parts.data.query_dataset, parts.config.batch_size
    last = parts.trajectory.checkpoints[parts.trajectory.last_step]
    state = {**last.buffers, **last.parameters}
    if name == "random":
        return random_scores(len(query), len(train), parts.config.seed)
    if name == "self_loss":
        return self_loss(parts.module, parts.task, state, train, len(query), size)
    if name == "last_layer":
        return last_layer_cosine(parts.module, parts.task, state, train, query, size)
    run = last_checkpoint(parts.trajectory)
    dotted = AttributionModule(parts.module, run, TracIn(), parts.task)
    found = dotted.attribute(train, query, size, trainer=quiet_trainer(), self_influence=False)
    return replace(found, provenance={**found.provenance, "estimator": name})


def _replay_device(asked: str | None, trajectory: Trajectory) -> torch.device:
    """The device asked for; else where the run was trained: elsewhere it rounds otherwise."""
    if asked is not None:
        return torch.device(asked)
    on_cuda = str(trajectory.facts.settings.get("device", "cpu")).startswith("cuda")
    return torch.device("cuda" if on_cuda and torch.cuda.is_available() else "cpu")


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    found = {"python": sys.version.split()[0]}
    for package in ("tda-lightning", "torch", "lightning", "hydra-core", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _provenance(config: DictConfig, predictions: list[str]) -> dict[str, Any]:
    """Which command and settings make the scores, and what the model says of each query."""
    made = {"command": command_line(), "config": OmegaConf.to_container(config, resolve=True)}
    return {**made, "predictions": predictions} if predictions else made


def _predictions(module: LightningModule, data: DataModule, trajectory: Trajectory) -> list[str]:
    """What the trained model says of each query, in the words of the data module if it has any."""
    if type(data).describe is DataModule.describe:
        return []
    last = trajectory.checkpoints[trajectory.last_step]
    module.load_state_dict({**last.buffers, **last.parameters}, strict=False)
    module.eval()
    with torch.no_grad():
        return data.describe(torch.cat([module(batch[0]) for batch in data.val_dataloader()]))


def _output_folder(config: DictConfig) -> Path:
    """Where to record; the runs of a sweep get a folder each, named by their settings."""
    folder = Path(config.output)
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return folder
    others = ("experiment=", "output=", "overwrite=")
    settings = [given for given in hydra.overrides.task if not given.startswith(others)]
    return folder / (_file_name(settings) or str(hydra.job.num))


def _require_solvable(config: DictConfig) -> None:
    """Refuse a solver that the estimator would not use."""
    if config.get("solver") is not None and "solver" not in config.estimator:
        raise ValueError(
            f"solver={HydraConfig.get().runtime.choices['solver']} is for estimators that invert "
            "curvature, such as estimator=influence; "
            f"{HydraConfig.get().runtime.choices['estimator']} has no use for it."
        )


def _estimator_name() -> str:
    """The estimator's name with the settings given on the command line: source-order-recorded."""
    hydra = HydraConfig.get()
    settings = [
        given.removeprefix("estimator.")
        for given in hydra.overrides.task
        if given.startswith(("estimator.", "solver=", "solver."))
    ]
    return _file_name([str(hydra.runtime.choices["estimator"]), *settings])


def _file_name(parts: Sequence[str]) -> str:
    # "=" and "," in a path would mean something to Hydra when it is given to the next command.
    return "-".join(re.sub(r"[^\w.]+", "-", part).strip("-") for part in parts)


def _scored_trajectory(
    config: DictConfig, scores: Path, provenance: Mapping[str, Any]
) -> Path | None:
    """The folder of the run that was scored, or None when it cannot be found."""
    if config.trajectory is not None:
        return Path(config.trajectory)
    named = _settings_of(provenance, "config").get("trajectory") or provenance.get("trajectory")
    # Beside the scores first: folders are moved as a whole.
    for folder in (scores.absolute().parent.parent, Path(str(named))):
        if (folder / FACTS_FILE).is_file():
            return folder
    return None


def _settings_of(provenance: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of the provenance; none where a file from elsewhere has something else there."""
    found = provenance.get(name)
    return found if isinstance(found, Mapping) else {}


def _given(settings: Mapping[Any, Any]) -> dict[str, Any]:
    """The settings that are not null."""
    return {str(key): value for key, value in settings.items() if value is not None}


def _required(config: DictConfig, key: str, example: str) -> str:
    if OmegaConf.is_missing(config, key):
        raise ValueError(f"Expected {key}, got none. For example: {example}")
    return str(config[key])


def _trainer(
    node: DictConfig,
    callbacks: list[Callback],
    progress: type[RichProgressBar] | None = RichProgressBar,
) -> Trainer:
    bar = node.get("enable_progress_bar", True) and sys.stderr.isatty()
    if progress is None:
        bar = False
    elif bar:
        callbacks = [*callbacks, progress()]
    given = instantiate(node.get("callbacks"), _convert_="all") or []
    make = instantiate(node, _partial_=True, _convert_="all")
    return make(callbacks=[*given, *callbacks], enable_progress_bar=bool(bar))


def quiet_lightning() -> None:
    """Keep Lightning's remarks to what a user can act on."""
    # What hardware there is, and how many workers there might be, is no news.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message="predict returned None.*")
