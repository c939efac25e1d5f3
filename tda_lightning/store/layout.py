"""All names and shapes of a trajectory on disk, on one page.

A trajectory is a folder of HDF5 files. Every file is complete: it is written aside as
``<name>.part`` and renamed into place, and is never written into afterwards, though a resumed
training removes what lies beyond its step and records it again. Every file carries the
root attributes ``format`` ("tda-lightning"), ``version`` (an integer) and ``kind`` (below).
Attributes of text have fixed length: the other kind lies outside of all checksums, and HDF5 can
hang on it. Nothing is pickled; texts are JSON. ``S`` steps, ``P`` parameter groups, ``B``
batches.

Of a training in W processes the first writes. A step's batches are the first of every process in
order of rank, then the second of every process, and so on; ``accumulation`` is W times each
process's own, ``loss`` the mean over the batches of all of them. Tensors are whole, buffers and
random states those of the first process::

    <trajectory>/
      trajectory.h5             kind "trajectory"
        facts                   JSON text [1]: parameters {name: {shape, dtype, group}}, optimizer,
                                num_examples, fingerprint {length, "<index>": sha256}, settings,
                                stages [{start, parameters [names], new_optimizer}]
      steps/<first>-<last>.h5   kind "steps": optimizer steps first to last (counted from 1)
        epoch                   int64   [S]
        learning_rate           float64 [S, P]   as applied; a group that was added later has
                                                 no column in earlier files, its rate being 0
        hyperparameters/<name>  float64 [S, P]
        loss                    float64 [S]      mean over the step's batches
        gradient_norm           float64 [S]      before clipping
        accumulation            int64   [S]      what each batch loss was divided by
        clipping                float64 [S]      gradient norm after clipping / before; 1 where
                                                 nothing was clipped (since version 2)
        batch_offsets           int64   [S + 1]  step s holds batches [s] to [s + 1]
        example_offsets         int64   [B + 1]  batch b holds examples [b] to [b + 1]
        examples                int64   [.]      training-example indices, in order
        random/<generator>/     states of a random generator right before a batch was fetched, of R
                                batches before which it or another was not as the batch before had
                                left it; without any, there is no group
          batches               int64   [R]      counted like those of example_offsets, increasing
          states                        [R, .]   as in a checkpoint
      checkpoints/<step>.h5     kind "checkpoint", attribute ``step``; 0 holds the initial weights
        parameters/<name>       parameters trained up to this step, in their own dtype
        buffers/<name>          every other tensor of the module (buffers, frozen parameters);
                                left out where it still equals the one in checkpoint 0
        optimizer/<name>/<state>   torch.optim's state of a parameter; absent if not recorded
        random/<generator>      states of the random generators that the step left behind (torch,
                                cuda<i>: uint8; python, numpy: int64 [627], the 624 words and the
                                position of a Mersenne twister, whether a second normal number
                                waits, its bits); absent if not recorded
      statistics/<start>-<stop>.h5   kind "statistics": curvature summed in training over sampled
                                examples of the steps start < step <= stop; such sums add up
        blocks                  JSON text [1]: {block: {parameters, shape [groups, rows, columns]}}
        <block>/left            second moment of the rows: [groups, rows] a diagonal; the lower
                                triangle of a matrix, row by row, under "packed left"
        <block>/right           likewise of the columns
        <block>/count           [groups]: left (x) right / count is the summed curvature
        <block>/trace           [1]: summed squared norms of the examples' gradients
        <block>/examples        [1]: how many examples
        <block>/samples         [2]: how many vectors left and right were summed over
      curvature/<key>.h5        kind "curvature": fitted curvature, by a hexadecimal key
        values/<name>           tensors
      unfinished/<key>.h5       kind "unfinished": where an interrupted exact unrolling goes on
        values/<name>           tensors
      features/<key>.h5         kind "features": of the training examples at a layer
        values/features         float32 [example, feature]
        values/place            uint8 [.], text: where in the model
      scores/*.h5               scores that were computed from this trajectory
      ground_truth/*.h5         measurements after retraining it (store/ground_truth.py)
      recording.lock            locked while a recorder writes; means nothing when left behind

A dataset of a tensor has the attribute ``dtype``, torch's name; what NumPy lacks (bfloat16, the
float8 family) is stored as unsigned integers of the same width. In names "/" is written "%2F"
and "%" is written "%25".
"""

from __future__ import annotations

import re
from pathlib import Path

FORMAT = "tda-lightning"
FORMAT_VERSION = 2

FACTS_FILE = "trajectory.h5"
STEPS_FOLDER = "steps"
CHECKPOINTS_FOLDER = "checkpoints"
STATISTICS_FOLDER = "statistics"
CURVATURE_FOLDER = "curvature"
UNFINISHED_FOLDER = "unfinished"
FEATURES_FOLDER = "features"
SCORES_FOLDER = "scores"
GROUND_TRUTH_FOLDER = "ground_truth"

# What attributions keep for later ones, each in a folder of its name.
CACHE_FOLDERS = (CURVATURE_FOLDER, UNFINISHED_FOLDER, FEATURES_FOLDER)

FACTS = "facts"
PARAMETERS = "parameters"
BUFFERS = "buffers"
OPTIMIZER = "optimizer"
RANDOM = "random"
RANDOM_BATCHES = "batches"
RANDOM_STATES = "states"
VALUES = "values"
BLOCKS = "blocks"
HYPERPARAMETERS = "hyperparameters"
STEP = "step"
DTYPE = "dtype"

# Columns of a steps file with their dtypes; hyperparameters/<name> stands beside them.
STEP_COLUMNS = {
    "epoch": "int64",
    "learning_rate": "float64",
    "loss": "float64",
    "gradient_norm": "float64",
    "accumulation": "int64",
    "clipping": "float64",
    "batch_offsets": "int64",
    "example_offsets": "int64",
    "examples": "int64",
}

# Exactly as written: at least eight digits, and no zero before more. A second name for a step
# would hide the first.
_STEP = r"(\d{8}|[1-9]\d{8,17})"
_STEPS_NAME = re.compile(rf"{_STEP}-{_STEP}\.h5", re.ASCII)
_CHECKPOINT_NAME = re.compile(rf"{_STEP}\.h5", re.ASCII)
KEY = re.compile(r"[0-9a-f]{1,128}")


def steps_file(root: Path, first: int, last: int) -> Path:
    """Where the steps ``first`` to ``last`` are recorded."""
    return root / STEPS_FOLDER / f"{first:08d}-{last:08d}.h5"


def steps_files(root: Path) -> list[tuple[int, int, Path]]:
    """(first, last, file) of the steps recorded in ``root``: by first step, the longest first."""
    found = []
    for path in _files(root / STEPS_FOLDER):
        if match := _STEPS_NAME.fullmatch(path.name):
            found.append((int(match[1]), int(match[2]), path))
    return sorted(found, key=lambda entry: (entry[0], -entry[1]))


def checkpoint_file(root: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` is."""
    return root / CHECKPOINTS_FOLDER / f"{step:08d}.h5"


def checkpoint_files(root: Path) -> dict[int, Path]:
    """The finished checkpoints in ``root``, by step."""
    found = {}
    for path in _files(root / CHECKPOINTS_FOLDER):
        if match := _CHECKPOINT_NAME.fullmatch(path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def statistics_file(root: Path, start: int, stop: int) -> Path:
    """Where the statistics of an interval are."""
    return root / STATISTICS_FOLDER / f"{start:08d}-{stop:08d}.h5"


def statistics_files(root: Path) -> dict[tuple[int, int], Path]:
    """The statistics in ``root`` by interval (start, stop)."""
    found = {}
    for path in _files(root / STATISTICS_FOLDER):
        if match := _STEPS_NAME.fullmatch(path.name):
            found[int(match[1]), int(match[2])] = path
    return dict(sorted(found.items()))


def cache_file(root: Path, kind: str, key: str) -> Path:
    """Where something of one kind is cached under a key."""
    return root / kind / f"{key}.h5"


def cache_files(root: Path, kind: str) -> dict[str, Path]:
    """What attributions kept in ``root`` of one kind, by key."""
    files = _files(root / kind)
    return {p.stem: p for p in files if p.suffix == ".h5" and KEY.fullmatch(p.stem)}


def scores_files(root: Path) -> list[Path]:
    """The files of scores kept in ``root``."""
    return [path for path in _files(root / SCORES_FOLDER) if path.suffix == ".h5"]


def ground_truth_files(root: Path) -> list[Path]:
    """The files of ground truth kept in ``root``."""
    return [path for path in _files(root / GROUND_TRUTH_FOLDER) if path.suffix == ".h5"]


def recorded_files(root: Path) -> list[Path]:
    """Every file that belongs to a recording in ``root``, the facts first."""
    facts = root / FACTS_FILE
    return [
        *([facts] if facts.exists() else []),
        *(path for _, _, path in steps_files(root)),
        *checkpoint_files(root).values(),
        *statistics_files(root).values(),
        *(path for kind in CACHE_FOLDERS for path in cache_files(root, kind).values()),
    ]


def encode(name: str) -> str:
    """A tensor's name as an HDF5 name, in which "/" would open a group."""
    return name.replace("%", "%25").replace("/", "%2F")


def decode(name: str) -> str:
    """The name that :func:`encode` was given."""
    return name.replace("%2F", "/").replace("%25", "%")


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
