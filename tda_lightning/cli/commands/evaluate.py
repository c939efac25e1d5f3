"""``tda evaluate``."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, open_dict
from rich.console import Console

from tda_lightning.attribution.matching import require_same_data
from tda_lightning.cli.command import clear_errors, command_line, required
from tda_lightning.cli.evaluation_baselines import baseline, baselines_of, check_baselines
from tda_lightning.cli.evaluation_limits import evaluation_limits
from tda_lightning.cli.evaluation_table import (
    JudgedScores,
    detection_table,
    evaluation_json,
    evaluation_notes,
    evaluation_table,
    judge,
    require_measurements,
    wrong_labels,
)
from tda_lightning.cli.judgements import check_judgements, judged_rows
from tda_lightning.cli.judgements_table import judgements_notes, judgements_table
from tda_lightning.cli.matched_keep import alpha_of, keep_notes
from tda_lightning.cli.pbrf_settings import complete_pbrf_settings
from tda_lightning.cli.proponent_removal import (
    removal_json,
    removal_note,
    removal_table,
    remove_proponents,
    requested_removals,
)
from tda_lightning.cli.question import ask_about_scored_queries, require_harmless
from tda_lightning.cli.retrained_subsets import retrained_subsets, truth_name
from tda_lightning.cli.retraining import RecordedRun
from tda_lightning.cli.retraining_cache import parse_part
from tda_lightning.cli.run_config import run_folder, versions
from tda_lightning.cli.simulation import (
    overshoot_note,
    simulate,
    simulation_json,
    simulation_note,
    simulation_table,
)
from tda_lightning.cli.spot_check import spot_check
from tda_lightning.evaluation.simulatability import require_steps
from tda_lightning.records.errors import TrajectoryMismatchError, UnsupportedTrainingError
from tda_lightning.records.ground_truth import PROTOCOLS
from tda_lightning.records.provenance import Provenance, well_formed
from tda_lightning.records.scores import Scores
from tda_lightning.store.atomic_write import write_text
from tda_lightning.store.layout import GROUND_TRUTH_FOLDER
from tda_lightning.store.scores_file import replace_provenance

# Enough retrained models to tell estimators apart, and enough to see whether one can be trusted.
_SUBSETS, _SPOT_CHECK_SUBSETS = 30, 8


@clear_errors
def evaluate(config: DictConfig) -> None:
    """Show how well scores predict retraining; retrainings are cached next to the trajectory."""
    began = time.monotonic()
    folder = Path(required(config, "trajectory", "tda evaluate trajectory=FOLDER scores=FILE"))
    files = _score_files(config, folder)
    asked, folder = folder, run_folder(folder)  # an ensemble is judged by the run it was made from
    config.trajectory = str(folder)
    scores = {file.stem: Scores.load(file) for file in files}
    _complete_settings(config, scores)
    run = RecordedRun.load(config)
    require_same_data(run.trajectory, run.train)
    _require_shapes(run, scores)
    if config.judge is not None or config.simulate is not None:
        _without_retraining(run, scores, asked)
        return

    path = folder / GROUND_TRUTH_FOLDER / f"{truth_name(config)}.h5"
    path = Path(config.ground_truth or path)
    removals = requested_removals(config, scores, path)
    truth = retrained_subsets(run, path)
    for name, judged in scores.items():
        require_measurements(name, judged, truth)
    removed = {asked.what: remove_proponents(run, asked) for asked in removals}
    if config.part is not None:
        print(
            f"Part {config.part} of the retrainings is done and kept in {path.parent}. When all "
            "parts are done, the same command without part= collects them and judges the scores."
        )
        return

    wrong = wrong_labels(run.data)
    rows = [judge(name, judged, truth, wrong) for name, judged in scores.items()]
    compared = dict(scores)
    for name in baselines_of(run):
        started = time.monotonic()
        try:
            made = baseline(name, run)
        except (UnsupportedTrainingError, ValueError) as error:
            rows.append(JudgedScores(name, "baseline", reason=f"not possible: {error}"))
            continue
        rows.append(judge(name, made, truth, wrong, time.monotonic() - started))
        if name == "gradient_dot":  # the only baseline that scores are compared with
            compared.setdefault(name, made)

    seconds = time.monotonic() - began
    header: dict[str, object] = {
        "command": command_line(),
        "versions": versions(),
        "trajectory": str(folder),
        "ground_truth": str(path),
        "scores": [str(file) for file in files],
    }
    if config.protocol == "pbrf":
        header["damping"] = config.damping
    limits = evaluation_limits(truth)
    table = evaluation_json(rows, truth, seconds, header, limits)
    for what, results in removed.items():
        table["removal" if what == "examples" else "token_removal"] = removal_json(results)
    beside = path if asked == folder else asked / path.name
    output = Path(config.output or beside.with_suffix(".json"))
    write_text(output, json.dumps(table, indent=1))
    if config.spot_check:
        for file, row in zip(files, rows, strict=False):
            trust = spot_check(row, compared, truth, limits, run, command_line())
            replace_provenance(file, {**scores[row.name].provenance, "trust": trust})

    console = Console()
    console.print(evaluation_table(rows, truth.protocol, limits))
    if (detection := detection_table(rows)) is not None:
        console.print(detection)
    for what, results in removed.items():
        console.print(removal_table(results, what))
    if removed:
        print(removal_note(config.protocol, removed.values()))
    keeps = {row.name: row.keep for row in rows if row.keep is not None}
    notes = [evaluation_notes(rows, truth, seconds, limits)]
    notes += keep_notes(keeps, truth.fraction, asked)
    print(*notes, f"Ground truth: {path}", sep="\n")
    print(f"Table: {output}")
    if config.spot_check:
        print(f"Added to the provenance of {', '.join(map(str, files))}")


def _without_retraining(run: RecordedRun, scores: Mapping[str, Scores], folder: Path) -> None:
    """What ``judge`` and ``simulate`` ask for."""
    config, console = run.config, Console()
    table: dict[str, object] = {
        "command": command_line(),
        "versions": versions(),
        "num_queries": len(run.queries),
        "num_train": len(run.train),
    }
    if config.judge is not None:
        rows = list(judged_rows(run, scores))
        table["judgements"] = [row.as_json() for row in rows]
        console.print(judgements_table(rows, config.judge))
        print(judgements_notes(rows, config))
    if config.simulate is not None:
        simulated = simulate(run, scores)
        table["simulatability"] = simulation_json(simulated)
        console.print(simulation_table(simulated))
        print(simulation_note(run))
        if note := overshoot_note(run, simulated):
            print(note)
    output = Path(config.output or folder / "scores" / "judgements.json")
    write_text(output, json.dumps(table, indent=1))
    print(f"Table: {output}")


def _score_files(config: DictConfig, folder: Path) -> list[Path]:
    """The files of scores to judge."""
    given = config.scores
    if given is None:
        files = sorted((folder / "scores").glob("*.h5"))
        if not files and config.baselines is not None and not config.baselines:
            raise ValueError(
                f"Expected scores, got none, and there are none in {folder / 'scores'}. For "
                "example: tda evaluate trajectory=FOLDER scores=FILE"
            )
        return files
    files = [Path(given)] if isinstance(given, str) else [Path(file) for file in given]
    if len({file.stem for file in files}) < len(files):
        raise ValueError(f"Scores must have different names, got {', '.join(map(str, files))}.")
    return files


def _complete_settings(config: DictConfig, scores: Mapping[str, Scores]) -> None:
    """Check settings before anything is loaded, and fill in those that the scores decide."""
    if config.spot_check and not scores:
        raise ValueError(
            "A spot check is kept in the scores' files, and there are none. For example: tda "
            "evaluate trajectory=FOLDER scores=FILE spot_check=true"
        )
    if config.protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be among {', '.join(PROTOCOLS)}, got {config.protocol}.")
    removal = config.removal is not None or config.token_removal is not None
    if removal and not scores:
        raise ValueError("removal leaves out the proponents that scores name, and there are none.")
    if config.judge is not None:
        check_judgements(config)
    if config.simulate is not None:
        require_steps(list(config.simulate), config.simulate_rate)
    parse_part(config.part)
    if config.alpha is not None and config.leave_out is not None:
        raise ValueError(
            "alpha (the share that subsets keep) and leave_out (the number left out) say the same "
            f"thing: give one of them, got alpha={config.alpha:g} and leave_out={config.leave_out}."
        )
    complete_pbrf_settings(config, scores)
    if config.num_subsets is None:
        config.num_subsets = _SPOT_CHECK_SUBSETS if config.spot_check else _SUBSETS
    check_baselines(config)
    if config.alpha is None:
        config.alpha = alpha_of(scores)
    first = next(iter(scores.values()), None)
    _complete_measurement(config, Provenance() if first is None else well_formed(first.provenance))
    if first is not None:
        ask_about_scored_queries(config, first)


def _complete_measurement(config: DictConfig, first: Provenance) -> None:
    """Measure retrained models as the scores were asked.

    Raises:
        ValueError: in a way that only loss can be measured.
    """
    asked = first.get("config", {}).get("measurement")
    given = config.get("measurement")
    if given is None and asked is not None:
        require_harmless(asked, config.trust_config)
        with open_dict(config):
            config.measurement = given = asked
    elsewhere = config.protocol == "pbrf" or config.removal is not None or config.token_removal
    if given is not None and elsewhere:
        raise ValueError(
            "protocol=pbrf and removal= measure the task's own measurement, and these scores are "
            "of another one. Evaluate them by retraining on subsets."
        )
    if "measurement" in first and given is None:
        raise ValueError(
            f"The scores are about {first['measurement']['quantity']}, which this command does not "
            "know how to measure: give measurement=..., as in tda attribute."
        )


def _require_shapes(run: RecordedRun, scores: Mapping[str, Scores]) -> None:
    """Refuse scores of other data before any retraining."""
    shape = (len(run.data.query_dataset), len(run.data.train_dataset))
    for name, judged in scores.items():
        if judged.values.shape != shape:
            raise TrajectoryMismatchError(
                f"The scores {name} are of {judged.num_queries} queries and {judged.num_train} "
                f"training examples; the data of this run have {shape[0]} and {shape[1]}. Give "
                "scores of this run, with the data settings of their attribution."
            )
