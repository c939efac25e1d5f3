"""All files that the library writes: their names, contents and format versions, on one page.

Every file is HDF5, readable with h5py alone, and complete: it is written aside as
``<name>.<process>.part`` and renamed into place. Nothing is pickled. Arrays carry HDF5's
checksums, except in a file of scores, which can be mapped into memory and has its own. JSON is
stored as text [1]. Text has a fixed length: HDF5 keeps the other kind outside of all checksums,
and can hang on it. A dataset of a tensor has the attribute ``dtype``, torch's name for it; what
NumPy lacks (bfloat16, the float8 family) is stored as unsigned integers of the same width. In
names, "/" is written "%2F" and "%" is written "%25".

Root attributes say what a file is. Every file in a trajectory, except for scores and ground truth,
has ``format`` ("tda-lightning"), ``version`` (2; 3 of an index's shards) and ``kind`` (below).

**A trajectory** is a folder. ``S`` steps, ``P`` parameter groups, ``B`` batches. A file is never
written into once it is there, but a resumed training removes what lies beyond its step and records
it again. Of a training in W processes the first one writes. A step's batches are then the first of
every process in order of rank, then the second of every process, and so on; ``accumulation`` is W
times each process's own, and ``loss`` is the mean over the batches of all processes. Tensors are
whole; buffers and random states are those of the first process::

    <trajectory>/
      trajectory.h5             kind "trajectory"
        facts                   JSON: parameters {name: {shape, dtype, group}}, optimizer,
                                num_examples, fingerprint {length, "<index>": sha256}, settings,
                                stages [{start, parameters [names], new_optimizer}], base {name:
                                sha256} of frozen weights that no checkpoint holds
        data_weights            float64 [examples], of what-if and weighted runs alone: what each
                                example's loss was multiplied by in training
      steps/<first>-<last>.h5   kind "steps": optimizer steps first to last (counted from 1)
        epoch                   int64   [S]
        learning_rate           float64 [S, P]   as applied; a group that was added later has
                                                 no column in earlier files: its rate was 0
        hyperparameters/<name>  float64 [S, P]
        loss                    float64 [S]      mean over the step's batches
        gradient_norm           float64 [S]      before clipping
        accumulation            int64   [S]      what each batch loss was divided by
        clipping                float64 [S]      gradient norm after clipping / before; 1 where
                                                 nothing was clipped
        batch_offsets           int64   [S + 1]  step s holds batches [s] to [s + 1]
        example_offsets         int64   [B + 1]  batch b holds examples [b] to [b + 1]
        examples                int64   [.]      training-example indices, in order
        random/<generator>/     states of a random generator right before a batch was fetched, for
                                the R batches before which any generator was not as the batch
                                before had left it; no group where there are none
          batches               int64   [R]      counted like those of example_offsets, increasing
          states                        [R, .]   as in a checkpoint
      checkpoints/<step>.h5     kind "checkpoint", attribute ``step``; 0 holds the initial weights
        parameters/<name>       parameters trained up to this step, in their own dtype
        buffers/<name>          every other tensor of the module (buffers, frozen parameters) but
                                those of the base; left out where it still equals the one in
                                checkpoint 0
        optimizer/<name>/<state>   torch.optim's state of a parameter; absent if not recorded
        random/<generator>      states of the random generators after the step (torch, cuda<i>:
                                uint8; python, numpy: int64 [627], the 624 words and the position
                                of a Mersenne twister, whether a second normal number is stored,
                                and its bits); absent if not recorded
      statistics/<start>-<stop>.h5   kind "statistics": curvature summed in training over sampled
                                examples of the steps start < step <= stop; such sums add up
        blocks                  JSON: {block: {parameters, shape [groups, rows, columns]}}
        <block>/left            second moment of the rows: [groups, rows] a diagonal; the lower
                                triangle of a matrix, row by row, under "packed left"
        <block>/right           likewise for the columns
        <block>/count           [groups]: left (x) right / count is the summed curvature
        <block>/trace           [1]: summed squared norms of the examples' gradients
        <block>/examples        [1]: number of examples
        <block>/samples         [2]: number of vectors that left and right were summed over
      curvature/<key>.h5        kind "curvature": cached curvature, by a hexadecimal digest
        values/<name>           tensors
      features/<key>.h5         kind "features": cached features of the training examples
        values/features         float32 [example, feature]
        values/place            uint8 [.], text: the layer that they are read at
      unfinished/<key>.h5       kind "unfinished": where an interrupted attribution resumes
        values/<name>           tensors
      what_if/<key>/            a trajectory: the run trained again with weights on its examples,
                                by a hexadecimal digest of all that determines it
      scores/*.h5               scores computed from this trajectory
      ground_truth/*.h5         measurements after retraining
      recording.lock            locked while a recorder writes; a file left behind means nothing

**An index** of gradients is a folder, usually in a trajectory's ``index``. ``N`` rows, ``W``
numbers in a row. Codes lie in one piece, so that they can be mapped into memory; they have a
checksum of their own::

    <index>/
      index.h5                  kind "index"
        about                   JSON: num_train, width, dtype, shard, terms [{steps, used}],
                                compression (digest), made_of (digest), provenance, appended
                                [{first, count, fingerprint, finished}]
      compression.h5            kind "compression", attribute ``compression``: leading, factors or
                                random
        values/<name>           tensors of it
      shards/<first>-<stop>.h5  kind "shard": rows first to stop, not included, counted from 0;
                                attributes ``first``, ``compression`` and ``checksum``, the CRC-32
                                of codes
        codes                   int8, float16, float32, float64 [N, W], or int8 [N, W / 2] for int4:
                                the first half of a row's numbers in the lower four bits of its
                                bytes, the second in the upper four, in two's complement
        scales                  float32 (float64 of codes in float64) [N]: a row is scale times code

**Scores**, anywhere. Root attributes ``format`` ("tda-lightning scores") and ``format_version`` (1,
or 2 with candidates). Arrays are contiguous and uncompressed, so that a file larger than memory can
be mapped::

    values                      float32 or float64 [query, train]; NaN where there is no score
    by_segment                  the same type [segment, query, train]; absent without segments
    self_influence              the same type [train]; absent when not computed
    by_token                    the same type [query, train, position]; absent when not asked for;
                                NaN where there is no score
    by_query_token              the same type [query, position, train], likewise
    members                     the same type [member, query, train], of an ensemble, whose mean is
                                values; absent for a single run
    direct                      the same type [query, train]; of edits of a graph, the part of
                                values at unchanged weights; absent for other columns
    by_timestep                 the same type [timestep, query, train], of a diffusion model, whose
                                mean is values; absent when not asked for
    candidates                  int64 [query, k], the training examples that were scored for each
                                query, nearest first; absent where all were scored
    provenance                  JSON text []: how the scores were made
    checksums/<name>            uint32, CRC-32 of the bytes of each row (the last axis) of a dataset
                                above; of the provenance, of all of its bytes

**Ground truth**, anywhere. Root attributes ``format`` ("tda-lightning ground truth"),
``format_version`` (1) and ``protocol`` ("single_run", "algorithm" or "pbrf"). It is written anew
after every retraining, so one that is interrupted leaves all earlier ones::

    subsets                     bool [subset, train], True for the examples that a subset keeps
    seeds                       int64 [subset, seed], of each retraining; -1 for the recorded one
    done                        bool [subset, seed], whether the retraining was made
    outcomes                    float64 [subset, seed, query], measurements; 0 where not done
    seconds                     float64 [subset, seed], how long it took
    baseline                    float64 [query], measurements at the recorded run's last checkpoint
    classes                     int64 [subset, seed, query], what the retrained model predicts, 0
                                where not done; absent when not asked for
    configuration               JSON: digests and settings that determine the outcomes
    made_by                     JSON: command and versions
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_RECORD_AGAIN = "Restore the file from a copy, or record again."


@dataclass(frozen=True)
class FileKind:
    """How a kind of file is recognised.

    Attributes:
        name: what it holds, in words.
        advice: what to do about a damaged one.
        format: root attribute.
        version_attribute: name of the root attribute that holds the format version.
        oldest, newest: format versions that this release reads.
        older: what to do about one of a version before them.
    """

    name: str
    advice: str = _RECORD_AGAIN
    format: str = "tda-lightning"
    version_attribute: str = "version"
    oldest: int = 2
    newest: int = 2
    older: str = "Record the run again."

    @property
    def has_kind(self) -> bool:
        """Whether a root attribute ``kind`` tells it from others of the same format."""
        return self.version_attribute == "version"


TRAJECTORY = FileKind("trajectory")
STEPS = FileKind("steps")
CHECKPOINT = FileKind("checkpoint")
STATISTICS = FileKind("statistics")
CURVATURE = FileKind("curvature", "Delete the file: it is computed again.")
FEATURES = FileKind("features", CURVATURE.advice)
UNFINISHED = FileKind("unfinished", CURVATURE.advice)
SCORES = FileKind(
    "scores",
    "Restore the file from a copy, or compute the scores again.",
    format="tda-lightning scores",
    version_attribute="format_version",
    oldest=1,
)
GROUND_TRUTH = FileKind(
    "ground truth",
    "Restore the file from a copy, or delete it to retrain.",
    format="tda-lightning ground truth",
    version_attribute="format_version",
    oldest=1,
    newest=1,
)

INDEX = FileKind("index", "Build the index again, in the same folder: whole shards are kept.")
COMPRESSION = FileKind("compression", "Delete the index and build it again.")
SHARD = FileKind("shard", INDEX.advice, oldest=3, newest=3, older=INDEX.advice)

# Cached tensors: each kind has a folder of its name, and a file for each key.
CACHES = (CURVATURE, UNFINISHED, FEATURES)

FACTS_FILE = "trajectory.h5"
STEPS_FOLDER = "steps"
CHECKPOINTS_FOLDER = "checkpoints"
STATISTICS_FOLDER = "statistics"
SCORES_FOLDER = "scores"
GROUND_TRUTH_FOLDER = "ground_truth"
WHAT_IF_FOLDER = "what_if"
INDEX_FILE = "index.h5"
COMPRESSION_FILE = "compression.h5"
SHARDS_FOLDER = "shards"

FACTS = "facts"
DATA_WEIGHTS = "data_weights"
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

# Exactly as written: at least eight digits, and no leading zero in more. A second name for a step
# would hide the first.
_STEP = r"(\d{8}|[1-9]\d{8,17})"
_STEPS_NAME = re.compile(rf"{_STEP}-{_STEP}\.h5", re.ASCII)
_CHECKPOINT_NAME = re.compile(rf"{_STEP}\.h5", re.ASCII)
KEY = re.compile(r"[0-9a-f]{1,128}")


def steps_file(root: Path, first: int, last: int) -> Path:
    """The file of steps ``first`` to ``last``."""
    return root / STEPS_FOLDER / f"{first:08d}-{last:08d}.h5"


def steps_files(root: Path) -> list[tuple[int, int, Path]]:
    """(first, last, file) of the recorded steps: by first step, the longest first."""
    intervals = _intervals(root / STEPS_FOLDER)
    return sorted(intervals, key=lambda entry: (entry[0], -entry[1]))


def checkpoint_file(root: Path, step: int) -> Path:
    """The file of the checkpoint after ``step`` steps."""
    return root / CHECKPOINTS_FOLDER / f"{step:08d}.h5"


def checkpoint_files(root: Path) -> dict[int, Path]:
    """The finished checkpoints, by step."""
    files = {
        int(match[1]): path
        for path in _files(root / CHECKPOINTS_FOLDER)
        if (match := _CHECKPOINT_NAME.fullmatch(path.name))
    }
    return dict(sorted(files.items()))


def statistics_file(root: Path, start: int, stop: int) -> Path:
    """The file of the statistics of steps ``start`` < step <= ``stop``."""
    return root / STATISTICS_FOLDER / f"{start:08d}-{stop:08d}.h5"


def statistics_files(root: Path) -> dict[tuple[int, int], Path]:
    """The statistics, by interval (start, stop)."""
    intervals = _intervals(root / STATISTICS_FOLDER)
    return {(start, stop): path for start, stop, path in sorted(intervals)}


def cache_file(root: Path, kind: FileKind, key: str) -> Path:
    """The file of the cached tensors of a kind under ``key``."""
    return root / kind.name / f"{key}.h5"


def cache_files(root: Path, kind: FileKind) -> dict[str, Path]:
    """The files of cached tensors of a kind, by key."""
    files = _files(root / kind.name)
    return {p.stem: p for p in files if p.suffix == ".h5" and KEY.fullmatch(p.stem)}


def scores_files(root: Path) -> list[Path]:
    """The files of scores in the trajectory's folder."""
    return [path for path in _files(root / SCORES_FOLDER) if path.suffix == ".h5"]


def ground_truth_files(root: Path) -> list[Path]:
    """The files of ground truth in the trajectory's folder."""
    return [path for path in _files(root / GROUND_TRUTH_FOLDER) if path.suffix == ".h5"]


def what_if_folder(root: Path, key: str) -> Path:
    """The folder of the what-if run under ``key``."""
    return root / WHAT_IF_FOLDER / key


def what_if_folders(root: Path) -> list[Path]:
    """The folders of the what-if runs."""
    folder = root / WHAT_IF_FOLDER
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in found if KEY.fullmatch(path.name) and (path / FACTS_FILE).is_file()]


SHARD_NAME = re.compile(r"([0-9]{12,})-([0-9]{12,})\.h5")


def shard_file(root: Path, first: int, stop: int) -> Path:
    """The file of the rows ``first`` to ``stop`` of an index."""
    return root / SHARDS_FOLDER / f"{first:012d}-{stop:012d}.h5"


def recorded_files(root: Path) -> list[Path]:
    """Every file that belongs to a recording in ``root``, the facts first."""
    facts = root / FACTS_FILE
    return [
        *([facts] if facts.exists() else []),
        *(path for _, _, path in steps_files(root)),
        *checkpoint_files(root).values(),
        *statistics_files(root).values(),
        *(path for kind in CACHES for path in cache_files(root, kind).values()),
    ]


def encode(name: str) -> str:
    """A tensor's name as an HDF5 name, in which "/" would open a group."""
    return name.replace("%", "%25").replace("/", "%2F")


def decode(name: str) -> str:
    """The tensor's name that :func:`encode` was given."""
    return name.replace("%2F", "/").replace("%25", "%")


def _intervals(folder: Path) -> list[tuple[int, int, Path]]:
    matches = [(_STEPS_NAME.fullmatch(path.name), path) for path in _files(folder)]
    return [(int(match[1]), int(match[2]), path) for match, path in matches if match]


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
