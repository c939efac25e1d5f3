"""What fuzzing found, and what it can only find by luck, each by its name.

``tests/store/test_fuzz.py`` draws the damage; here it is placed.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from rich.console import Console

from tda_lightning import AttributionModule, Scores
from tda_lightning.cli.inspect_table import description_table
from tda_lightning.estimators import TracIn
from tda_lightning.optimizers import recorded_states, rule_of
from tda_lightning.records.errors import TrajectoryFormatError
from tda_lightning.replay.run import Replay, Walk
from tda_lightning.report import write_report
from tda_lightning.runtime.loading import ExampleSource
from tda_lightning.store import layout, open_trajectory
from tda_lightning.store.inspect import describe
from tda_lightning.store.untrusted import from_json, to_json
from tda_lightning.tasks import as_task
from tests.runs import Net, Numbered, fit

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "recorded"
    fit(path, recorder={"num_checkpoints": 2})
    return path


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "copy"))


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    path = tmp_path / "scores.h5"
    parts, tokens = torch.randn(2, 3, 5), torch.randn(3, 5, 4)
    Scores(parts.sum(0), parts, torch.rand(5), {"estimator": "x"}, tokens).save(path)
    return path


STEPS = "steps/00000001-00000012.h5"
LAST = "checkpoints/00000012.h5"


def put(path: Path, name: str, values: Any, **options: Any) -> None:
    """Replace a data set, whose attributes are kept."""
    with h5py.File(path, "r+", libver="latest") as file:
        attributes = dict(file[name].attrs)
        del file[name]
        if not isinstance(values, h5py.ExternalLink):
            file.create_dataset(name, data=values, **options).attrs.update(attributes)
        else:
            file[name] = values


def change_facts(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    with h5py.File(root / "trajectory.h5") as file:
        facts = json.loads(file["facts"][0])
    change(facts)
    text = json.dumps(facts).encode()
    put(root / "trajectory.h5", "facts", np.array([text], f"S{len(text)}"))


def sealed(path: Path) -> None:
    """Make the checksums of a scores file agree with its content."""
    with h5py.File(path, "r+", libver="latest") as file:
        text = file["provenance"][()]
        file["checksums/provenance"][...] = zlib.crc32(text)
        for name in ("values", "by_token"):
            rows = checksums(file[name][...])
            del file[f"checksums/{name}"]
            file[f"checksums/{name}"] = rows


def checksums(array: np.ndarray) -> np.ndarray:
    """Of its rows, as a scores file has them."""
    rows = np.empty(array.shape[:-1], np.uint32)
    for row in np.ndindex(rows.shape):
        rows[row] = zlib.crc32(array[row].tobytes())
    return rows


# Waiting for ever.


@pytest.mark.parametrize("name", ["trajectory.h5", STEPS, LAST])
def test_texts_of_variable_length_are_not_read(name: str, copy: Path) -> None:
    """HDF5 2.0 loops for ever over some single wrong bytes in the heap that holds them."""
    with h5py.File(copy / name, "r+") as file:
        file.attrs["kind"] = file.attrs["kind"].decode()
    with pytest.raises(TrajectoryFormatError, match="'kind' is not a text of fixed length"):
        open_trajectory(copy)


def test_a_written_file_has_no_heap_of_texts(copy: Path, scores: Path) -> None:
    for path in [*copy.rglob("*.h5"), scores]:
        assert b"GCOL" not in path.read_bytes(), path.name


def test_a_pipe_is_not_opened(copy: Path, scores: Path) -> None:
    scores.unlink()
    os.mkfifo(scores)
    with pytest.raises(TrajectoryFormatError, match="is a pipe, socket or device"):
        Scores.load(scores)
    (copy / LAST).unlink()
    (copy / LAST).symlink_to(scores)
    assert open_trajectory(copy).last_step == 6


@pytest.mark.parametrize("target", ["fifo", "checkpoints/00000012.h5"])
def test_a_link_to_another_file_is_not_followed(target: str, copy: Path) -> None:
    """Not even by asking whether the optional group of optimizer states is there."""
    os.mkfifo(copy / "fifo")
    put(copy / LAST, "optimizer", h5py.ExternalLink(str(copy / target), "/optimizer"))
    states = open_trajectory(copy).checkpoints[12].optimizer
    assert states is not None
    with pytest.raises(TrajectoryFormatError, match="no 'optimizer'"):
        len(states)


# Memory.


def test_claims_beyond_the_file_are_refused(copy: Path) -> None:
    with h5py.File(copy / STEPS, "r+", libver="latest") as file:
        del file["examples"]
        file.create_dataset("examples", (2**40,), "<i8", chunks=(1 << 16,))
    with pytest.raises(TrajectoryFormatError, match=r"claims \d+ bytes"):
        open_trajectory(copy)


def test_chunks_of_gigabytes_are_refused(copy: Path) -> None:
    options = {"chunks": (1 << 28,), "maxshape": (None,), "compression": "gzip"}
    with h5py.File(copy / STEPS, "r+", libver="latest") as file:
        del file["loss"]
        file.create_dataset("loss", (12,), "<f8", **options)
    with pytest.raises(TrajectoryFormatError, match="in chunks of 2147483648"):
        open_trajectory(copy)


def test_a_number_for_a_provenance_makes_no_room(scores: Path) -> None:
    """``bytes(n)`` makes n zeros."""
    put(scores, "provenance", np.int64(10**15))
    with pytest.raises(TrajectoryFormatError, match="provenance is no text"):
        Scores.load(scores)


# Names.


@pytest.mark.parametrize("name", ["٠٠٠٠٠٠٠٦.h5", "0000000006.h5", "00000006.h5.part", "6.h5"])
def test_a_second_name_of_a_step_does_not_hide_it(name: str, copy: Path) -> None:
    (copy / "checkpoints" / name).write_bytes(b"hello")
    trajectory = open_trajectory(copy)
    assert list(trajectory.checkpoints) == [0, 6, 12]
    assert trajectory.checkpoints[6].step == 6


def test_names_that_are_no_utf8_are_refused(copy: Path) -> None:
    with h5py.File(copy / LAST, "r+") as file:
        h5py.h5o.link(file["buffers/net.1.running_mean"].id, file["buffers"].id, b"\xff")
    with pytest.raises(TrajectoryFormatError, match="names that are not UTF-8"):
        open_trajectory(copy).checkpoints[12]


# Numbers that would be computed with.


def test_offsets_whose_differences_overflow(copy: Path) -> None:
    with h5py.File(copy / STEPS) as file:
        offsets = file["example_offsets"][()]
    offsets[1:3] = [2**63 - 1, -2]
    put(copy / STEPS, "example_offsets", offsets)
    with pytest.raises(TrajectoryFormatError, match="offsets do not lead"):
        open_trajectory(copy)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("examples", 22, "expected examples of 22, got example 22"),
        ("examples", -1, "negative example indices"),
        ("accumulation", 0, "accumulation below 1"),
        ("epoch", -1, "epoch below 0"),
        ("clipping", -0.5, "clipping factor below 0"),
        ("learning_rate", np.inf, "learning_rate is not finite"),
        ("hyperparameters/momentum", np.nan, "momentum is not finite"),
    ],
)
def test_impossible_steps(column: str, value: float, message: str, copy: Path) -> None:
    with h5py.File(copy / STEPS) as file:
        values = file[column][()]
    values[-1] = value
    put(copy / STEPS, column, values)
    with pytest.raises(TrajectoryFormatError, match=message):
        open_trajectory(copy)


def test_steps_without_what_the_formula_needs(copy: Path) -> None:
    with h5py.File(copy / STEPS, "r+") as file:
        del file["hyperparameters/dampening"]
    trajectory = open_trajectory(copy)
    with pytest.raises(TrajectoryFormatError, match="expected the hyper-parameters of SGD"):
        rule_of(trajectory)
    with pytest.raises(TrajectoryFormatError, match="expected the hyper-parameters of SGD"):
        AttributionModule(Net(), trajectory, TracIn())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f["parameters"]["net.0.weight"].update(group=1), "2 parameter groups or more"),
        (lambda f: f["parameters"]["net.0.weight"].update(group=2**40), "is in group"),
        (lambda f: f["parameters"]["net.0.weight"].update(shape=[5.0, 3]), "has shape"),
        (lambda f: f["parameters"]["net.0.weight"].update(shape=[10**300]), "has shape"),
        (lambda f: f["parameters"]["net.0.weight"].update(dtype="Tensor"), "has dtype 'Tensor'"),
        (lambda f: f.update(num_examples=-1), "num_examples is -1"),
        (lambda f: f.update(num_examples=23), "fingerprint of 22 examples, and 23"),
        (lambda f: f["fingerprint"].update({"22": "00"}), "fingerprint of example '22' of 22"),
        (lambda f: f["fingerprint"].update({"9" * 5000: "00"}), "is no number of an example"),
        (lambda f: f["fingerprint"].update({"٣": "00"}), "is no number of an example"),
        (lambda f: f.update(settings=[["seed", 1]]), "settings are no JSON object"),
        (lambda f: f.update(optimizer=None), "optimizer is no text"),
        (lambda f: f.update(parameters=[]), "AttributeError"),
        (lambda f: f.update(stages={}), "stages are no list"),
        (lambda f: f.update(stages=[{"start": "0", "parameters": []}]), "a stage starts at 0"),
        (lambda f: f.update(stages=[{"start": 0, "parameters": ["x"]}]), "a stage trains"),
        (lambda f: f.update(stages=[{"start": 0, "parameters": [[]]}]), "a stage trains"),
        (lambda f: f.update(stages=[{"start": 0}]), "KeyError"),
        (lambda f: f.update(stages=[0]), "TypeError"),
    ],
)
def test_impossible_facts(change: Callable[[Any], None], message: str, copy: Path) -> None:
    change_facts(copy, change)
    with pytest.raises(TrajectoryFormatError, match=message):
        open_trajectory(copy)


def test_optimizer_states_of_another_shape(copy: Path) -> None:
    put(copy / LAST, "optimizer/net.0.weight/momentum_buffer", np.zeros((3, 5), np.float32))
    trajectory = open_trajectory(copy)
    with pytest.raises(TrajectoryFormatError, match=r"momentum_buffer of net\.0\.weight has shape"):
        recorded_states(trajectory, 12)
    walk = Walk(Replay(trajectory, Net(), as_task(None), ExampleSource.of(Numbered(), 4, "train")))
    with pytest.raises(TrajectoryFormatError, match=r"momentum_buffer of net\.0\.weight has shape"):
        walk.restart(12)


def twister(place: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(state: np.ndarray) -> np.ndarray:
        state = state.copy()
        state[..., place] = value
        return state

    return change


def torch_counts(left: int, following: int, waits: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    def change(state: np.ndarray) -> np.ndarray:
        state = state.copy()
        state[..., 8:12] = np.array([left], "<i4").view("u1")
        state[..., 16:24] = np.array([following], "<u8").view("u1")
        state[..., 5052] = waits
        return state

    return change


@pytest.mark.parametrize("where", ["checkpoint", "steps"])
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("numpy", twister(624, 625), "numpy is none of a Mersenne twister"),
        ("numpy", twister(624, -1), "numpy is none of"),
        ("python", twister(624, 2**40), "python is none of"),
        ("python", twister(3, 2**32), "python is none of"),
        ("python", twister(3, -1), "python is none of"),
        ("numpy", twister(625, 2), "numpy is none of"),
        ("numpy", twister(626, 0x7FF8 << 48), "numpy is none of"),  # NaN
        ("numpy", lambda state: state * 0, "numpy is none of"),  # np.random.randn would never end
        ("python", lambda state: state[..., :-1], r"python is int64 \[626\]"),
        ("python", lambda state: state.astype(np.float64), "has dtype float64"),
        # As torch has them each may be up to 624; the two together lead beyond its words.
        ("torch", torch_counts(600, 600), "torch is none of"),
        ("torch", torch_counts(0, 0), "torch is none of"),
        ("torch", torch_counts(1, 2**32), "torch is none of"),
        ("torch", torch_counts(1, 0, waits=2), "torch is none of"),
        ("torch", lambda state: state[..., :-8], r"torch is uint8 \[5048\]"),
        ("torch", lambda state: state * 0, "torch is none of"),
    ],
)
def test_impossible_random_states(
    where: str, name: str, change: Any, message: str, copy: Path
) -> None:
    path, member = (
        (copy / LAST, f"random/{name}")
        if where == "checkpoint"
        else (copy / STEPS, f"random/{name}/states")
    )
    with h5py.File(path) as file:
        state = file[member][()]
    put(path, member, change(state))
    with pytest.raises(TrajectoryFormatError, match=message):
        dict(open_trajectory(copy).checkpoints[12].random or {})


def cuda(content: bytes) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file["random/cuda0/batches"] = np.array([0], "<i8")
        file["random/cuda0/states"] = np.frombuffer(content, "u1")[None]

    return change


def renamed(name: str) -> Callable[[h5py.File], None]:
    return lambda file: file.move("random/numpy", f"random/{name}")


def batches(*numbers: int) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        for group in file["random"].values():
            del group["batches"]
            group["batches"] = np.array(numbers, "<i8")

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.move("random/torch", "torch"), "expected torch's and Python's"),
        (lambda file: file.move("random/python", "python"), "expected torch's and Python's"),
        (renamed("cuda00"), "dtype int64|unknown generator"),
        (cuda(bytes(15)), r"\[15\]"),
        (cuda(bytes(8) + bytes([255]) * 8), "offset -1"),
        (cuda(bytes(8) + bytes([2]) + bytes(7)), "offset 2"),
        (batches(6, 0), "no increasing batches"),
        (batches(0), "no increasing batches"),
        (batches(-1, 0), "other batches than 12"),
        (batches(0, 12), "other batches than 12"),
        (batches(0, 2**62), "other batches than 12"),
    ],
)
def test_impossible_groups_of_random_states(
    change: Callable[[h5py.File], None], message: str, copy: Path
) -> None:
    with h5py.File(copy / STEPS, "r+") as file:
        assert file["random/numpy/batches"][()].tolist() == [0, 6]
        change(file)
    with pytest.raises(TrajectoryFormatError, match=message):
        open_trajectory(copy)


# Scores.


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((3, 5), np.nan, np.float32), "nan|not finite"),
        (np.zeros((3, 6), np.float32), "by_segment"),
        (np.zeros((3, 5), np.float16), "holds float16"),
        (np.zeros((3, 5), ">f4"), "holds >f4"),
        (np.zeros((3, 5), np.float64), "holds float32"),
    ],
)
def test_impossible_scores(values: Any, message: str, mapped: bool, scores: Path) -> None:
    put(scores, "values", values)
    sealed(scores)
    with pytest.raises(TrajectoryFormatError, match=message):
        Scores.load(scores, mapped=mapped)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.full((3, 5, 4), np.nan, np.float32), "nan|not finite"),
        (np.zeros((3, 6, 4), np.float32), "by_token"),
        (np.zeros((2, 5, 4), np.float32), "by_token"),
        (np.zeros((3, 5), np.float32), "by_token"),
        (np.zeros((3, 5, 4), np.float64), "holds float64"),
    ],
)
def test_impossible_scores_of_tokens(tokens: Any, message: str, mapped: bool, scores: Path) -> None:
    put(scores, "by_token", tokens)
    sealed(scores)
    with pytest.raises(TrajectoryFormatError, match=message):
        Scores.load(scores, mapped=mapped)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        (np.array([[0, 1], [2, 3], [3, 5]]), "0 to 4, got 0 to 5"),
        (np.array([[0, 1], [2, 2], [3, 4]]), "different"),
        (np.array([[0, 1], [2, 3], [1, 2]]), "example 2 is nan"),
        (np.array([[0], [2], [3]]), "no candidate"),
        (np.zeros((0, 2), np.int64), r"int64 \[3, k\]|checksum"),
        (np.array([[0.0, 1], [2, 3], [3, 4]]), "holds float64"),
        (np.array([0, 2, 3]), "holds int64 of shape"),
    ],
)
def test_impossible_candidates(candidates: Any, message: str, mapped: bool, scores: Path) -> None:
    values = torch.full((3, 5), torch.nan)
    chosen = torch.tensor([[0, 1], [2, 3], [1, 4]])
    values.scatter_(1, chosen, 1.0)
    path = scores.with_name("candidates.h5")
    Scores(values, candidates=chosen).save(path)
    assert torch.equal(Scores.load(path, mapped=mapped).candidates, chosen)
    put(path, "candidates", candidates)
    put(path, "checksums/candidates", checksums(candidates))
    with pytest.raises(TrajectoryFormatError, match=message):
        Scores.load(path, mapped=mapped)


@pytest.mark.parametrize("text", [b"[1]", b"\xff", b"{", b"[" * 150 + b"]" * 150])
def test_impossible_provenance(text: bytes, scores: Path) -> None:
    put(scores, "provenance", np.bytes_(text))
    sealed(scores)
    with pytest.raises(TrajectoryFormatError, match="is damaged"):
        Scores.load(scores)


def test_json_is_as_deep_when_written_as_when_read() -> None:
    value: Any = 1
    for _ in range(99):
        value = [value]
    assert from_json(to_json(value).encode()) == value
    with pytest.raises(ValueError, match="more than 100 deep"):
        to_json([value])


def test_query_indices_of_any_kind_are_reported(tmp_path: Path) -> None:
    for indices in (["x", 1], [None, 1], [-1, 0], [[0], [1]], "ab", {"0": 1}):
        odd = Scores(torch.randn(2, 4), provenance={"query_indices": indices})
        assert write_report(odd, tmp_path / "page.html").is_file()


@pytest.mark.parametrize("value", [-1e30, 1e30, -1.7e308, 1.7e308, 5e-324, 0.0])
def test_extreme_scores_are_reported(value: float, tmp_path: Path) -> None:
    values = torch.full((2, 4), value, dtype=torch.float64)
    tokens = values[:, :, None].expand(2, 4, 3).clone()
    odd = Scores(values, values.expand(2, 2, 4).clone(), values[0].clone(), {}, tokens)
    assert write_report(odd, tmp_path / "page.html").is_file()
    odd.self_influence[0] = -value
    assert write_report(odd, tmp_path / "page.html").is_file()


# Inspection.


def shown(path: Path) -> str:
    with io.TextIOWrapper(io.BytesIO(), encoding="utf-8") as screen:
        console = Console(width=200, file=screen, record=True)
        console.print(description_table(describe(path)))
        return console.export_text()


def test_a_folder_without_its_first_checkpoint_is_inspected(copy: Path) -> None:
    layout.checkpoint_file(copy, 0).unlink()
    problems = describe(copy).problems
    assert len(problems) == 1 and "00000000.h5 is missing" in problems[0]


def test_what_a_file_says_is_shown_without_its_control_characters(copy: Path) -> None:
    odd = {"module": "\x1b[31m[red]\ud800", "versions": ["x"], "planned_checkpoints": "12"}
    change_facts(copy, lambda facts: facts["settings"].update(odd))
    (copy / "scores").mkdir()
    (copy / "scores" / "gone.h5").symlink_to("nothing")
    text = shown(copy)
    assert "\ufffd[31m[red]\ufffd" in text
    assert "\x1b" not in text
    assert "interrupted" not in text


def test_a_run_that_did_not_reach_its_end_is_said(copy: Path) -> None:
    assert describe(copy).planned_end is None
    layout.checkpoint_file(copy, 12).unlink()
    found = describe(copy)
    assert (found.planned_end, found.problems) == (12, ())
    assert "ended before its last planned checkpoint, 12" in shown(copy)
