"""The store: what is written is read again exactly, and damage is never computed with."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from tda_lightning.cli.inspect_table import description_table
from tda_lightning.records.errors import (
    TrajectoryError,
    TrajectoryFormatError,
    TrajectoryMismatchError,
    TrajectoryNotFoundError,
)
from tda_lightning.records.trajectory import Checkpoint, Facts, ParameterFact, Steps, Trajectory
from tda_lightning.runtime.digests import digest
from tda_lightning.store import compare_fingerprints, fingerprint, layout, open_trajectory
from tda_lightning.store.hdf5 import put_array
from tda_lightning.store.inspect import describe
from tda_lightning.store.writer import TrajectoryWriter
from tests.runs import Net, Numbered, Stream, adamw, fit

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "recorded"
    fit(path, optimizers=adamw, recorder={"num_checkpoints": 2})
    open_trajectory(path).curvature["0af3"] = {"layer/a": torch.arange(2000.0)}
    return path


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "copy"))


def everything(trajectory: Trajectory) -> dict[str, Any]:
    """All that a trajectory holds, by flat names."""
    found: dict[str, Any] = {"facts": repr(trajectory.facts)}
    for field in dataclasses.fields(Steps):
        found[field.name] = getattr(trajectory.steps, field.name)
    found.update(found.pop("hyperparameters"))
    for batch, states in found.pop("random").items():
        found.update({f"before batch {batch} {name}": state for name, state in states.items()})
    for step, checkpoint in trajectory.checkpoints.items():
        for name, tensor in {**checkpoint.parameters, **checkpoint.buffers}.items():
            found[f"{step} {name}"] = tensor
        for name, state in (checkpoint.optimizer or {}).items():
            found.update({f"{step} {name} {key}": value for key, value in state.items()})
        found.update({f"{step} {name}": s for name, s in (checkpoint.random or {}).items()})
    for key, value in trajectory.curvature.items():
        found.update({f"{key} {name}": tensor for name, tensor in value.items()})
    return found


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
    return a == b


def _bits(tensor: Tensor) -> Tensor:
    """Raw bytes: NaN equals itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


# Round trips.


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def write(path: Path, parameters: dict[str, Tensor], **buffers: Tensor) -> Trajectory:
    """A trajectory of no steps."""
    facts = Facts(
        parameters={
            name: ParameterFact(tuple(t.shape), str(t.dtype).removeprefix("torch."), 0)
            for name, t in parameters.items()
        },
        optimizer="SGD",
        num_examples=None,
    )
    TrajectoryWriter(path).begin(facts, Checkpoint(0, parameters, buffers))
    return open_trajectory(path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (70, 300)], ids=str)
def test_tensors_come_back_bit_for_bit(dtype: Any, shape: Any, tmp_path: Path) -> None:
    size = int(np.prod(shape)) * dtype.itemsize
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8)
    # Every bit pattern, NaN payloads included; a bool is only ever 0 or 1.
    tensor = (raw % 2).bool() if dtype == torch.bool else raw.clone().view(dtype)
    tensor = tensor.reshape(shape)
    loaded = write(tmp_path, {"weight": tensor}).checkpoints[0].parameters["weight"]
    assert equal(loaded, tensor)


def test_views_and_odd_names_come_back(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    parameters = {
        "transposed": base.T,
        "strided": base[::2, 1],
        "a/b%2F.weight": torch.ones(2),
        "größe": torch.ones(1),
        "../x": torch.ones(3),
    }
    checkpoint = write(tmp_path / "run", parameters, mask=torch.eye(3).to_sparse()).checkpoints[0]
    assert list(checkpoint.parameters) == list(parameters)
    assert all(equal(checkpoint.parameters[n], t.contiguous()) for n, t in parameters.items())
    assert torch.equal(checkpoint.buffers["mask"], torch.eye(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_files_are_readable_with_h5py_alone(recorded: Path) -> None:
    trajectory = open_trajectory(recorded)
    with h5py.File(recorded / "trajectory.h5") as file:
        assert dict(file.attrs) == {"format": b"tda-lightning", "version": 2, "kind": b"trajectory"}
        facts = json.loads(file["facts"][0])
        assert facts["parameters"]["net.0.weight"] == {
            "shape": [5, 3],
            "dtype": "float32",
            "group": 0,
        }
    with h5py.File(recorded / "steps" / "00000001-00000012.h5") as file:
        assert file["learning_rate"].shape == (12, 1)
        assert file["hyperparameters/beta1"][:, 0].tolist() == [0.9] * 12
        first = file["examples"][: file["example_offsets"][1]]
        assert first.tolist() == trajectory.steps.batches(0)[0].tolist()
    with h5py.File(recorded / "checkpoints" / "00000006.h5") as file:
        assert file.attrs["step"] == 6
        weight = torch.from_numpy(file["parameters/net.0.weight"][()])
        assert torch.equal(weight, trajectory.checkpoints[6].parameters["net.0.weight"])
        assert file["optimizer/net.0.weight/exp_avg"].shape == (5, 3)
        assert file["random/torch"].dtype == np.uint8
        assert file["random/python"].shape == (627,)


def test_a_bfloat16_module_is_recorded_in_its_own_precision(tmp_path: Path) -> None:
    module = fit(tmp_path, module=Net().bfloat16(), precision="bf16-true", max_steps=3)
    checkpoint = open_trajectory(tmp_path).checkpoints[3]
    for name, parameter in module.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(checkpoint.parameters[name], parameter)
    with h5py.File(tmp_path / "checkpoints" / "00000003.h5") as file:
        stored = file["parameters/net.0.weight"]
        assert stored.dtype == np.uint16
        assert stored.attrs["dtype"] == b"bfloat16"


def test_what_no_step_moves_is_stored_once(tmp_path: Path) -> None:
    module = Net()
    module.register_buffer("table", torch.randn(100, 100))
    module.frozen = torch.nn.Linear(3, 2).requires_grad_(False)  # smaller than what is trained
    fit(tmp_path, module=module, recorder={"num_checkpoints": 2})
    assert layout.checkpoint_file(tmp_path, 0).stat().st_size > 40_000
    assert layout.checkpoint_file(tmp_path, 12).stat().st_size < 30_000
    last = open_trajectory(tmp_path).checkpoints[12]
    assert torch.equal(last.buffers["table"], module.table)
    assert torch.equal(last.buffers["frozen.weight"], module.frozen.weight)
    assert torch.equal(last.buffers["net.1.running_mean"], module.net[1].running_mean)


def test_steps_in_pieces_read_as_steps_in_one(tmp_path: Path) -> None:
    fit(tmp_path / "pieces", recorder={"every_n_steps": 1}, accumulate_grad_batches=2)
    fit(tmp_path / "one", recorder={"num_checkpoints": 1}, accumulate_grad_batches=2)
    pieces, one = (open_trajectory(tmp_path / name).steps for name in ("pieces", "one"))
    for field in dataclasses.fields(Steps):
        a, b = getattr(pieces, field.name), getattr(one, field.name)
        assert a.keys() == b.keys() if isinstance(a, dict) else torch.equal(a, b)
    assert len(layout.steps_files(tmp_path / "pieces")) == 1


# Kills: whatever was not renamed into place is not there.


def test_a_killed_run_is_readable_up_to_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Stands for a signal that lets nothing more be written."""

    def replace(source: Any, target: Any, *, alive: list[int]) -> None:
        if not alive[0]:
            raise Killed
        alive[0] -= 1
        os.rename(source, target)

    counted = [10_000]
    monkeypatch.setattr(os, "replace", lambda a, b: replace(a, b, alive=counted))
    fit(tmp_path / "whole", recorder={"every_n_steps": 3})
    total = 10_000 - counted[0]
    whole = everything(open_trajectory(tmp_path / "whole"))
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    for writes in range(total):
        path, alive = tmp_path / str(writes), [writes]
        monkeypatch.setattr(os, "replace", lambda a, b, alive=alive: replace(a, b, alive=alive))
        with pytest.raises(Killed):
            fit(path, recorder={"every_n_steps": 3})
        if writes < 2:  # the initial weights, then the facts
            with pytest.raises(TrajectoryNotFoundError):
                open_trajectory(path)
            continue
        trajectory = open_trajectory(path)
        assert trajectory.last_step == min((writes - 2) // 2 * 3, 12)
        assert trajectory.num_steps == trajectory.last_step
        for name, value in everything(trajectory).items():
            if name.split()[0].isdecimal():
                assert equal(value, whole[name]), name
    # One that was killed while it joined the steps has both forms of them.
    assert len(layout.steps_files(tmp_path / str(total - 1))) == 4


def test_states_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    fit(tmp_path, recorder={"every_n_steps": 6})
    checkpoint = open_trajectory(tmp_path).checkpoints[6]
    whole = open_trajectory(tmp_path).checkpoints[6]
    assert whole.optimizer and whole.random  # read now
    layout.checkpoint_file(tmp_path, 6).unlink()
    assert whole.optimizer.keys() == whole.parameters.keys() and "torch" in whole.random
    assert checkpoint.optimizer is not None
    with pytest.raises(FileNotFoundError):
        len(checkpoint.optimizer)


def test_a_killed_replacement_leaves_no_trajectory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After any of the deletions: what is left of the old files is not taken for a run."""
    fit(tmp_path, recorder={"every_n_steps": 3, "curvature": "online", "fisher": "empirical"})
    old = open_trajectory(tmp_path)
    facts, initial = old.facts, old.checkpoints[0]
    initial = replace(initial, optimizer=dict(initial.optimizer or {}), random=None)
    files = {p.name for p in tmp_path.rglob("*.h5")}
    remove, seen = Path.unlink, set()

    def unlink(path: Path, *args: Any, **options: Any) -> None:
        remove(path, *args, **options)
        seen.add(path.name)
        with pytest.raises(TrajectoryNotFoundError):
            open_trajectory(tmp_path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        TrajectoryWriter(tmp_path).begin(facts, initial, overwrite=True)
    assert seen == files
    assert open_trajectory(tmp_path).last_step == 0


def test_a_joined_file_beside_its_pieces_is_enough(tmp_path: Path) -> None:
    fit(tmp_path, recorder={"every_n_steps": 3})
    whole = layout.steps_file(tmp_path, 1, 12)
    expected = everything(open_trajectory(tmp_path))
    shutil.copy(whole, layout.steps_file(tmp_path, 4, 6))  # not looked at: it is covered
    assert all(equal(v, expected[k]) for k, v in everything(open_trajectory(tmp_path)).items())


# Damage.


@pytest.mark.parametrize("make", ["nothing", "empty", "file", "other"])
def test_a_folder_without_a_trajectory(make: str, tmp_path: Path) -> None:
    path = tmp_path / "runs"
    if make == "file":
        path.write_text("hello")
    elif make != "nothing":
        path.mkdir()
    if make == "other":
        (path / "model.ckpt").write_text("hello")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(TrajectoryNotFoundError, match=r"No trajectory in .*trajectory\.h5"):
        open_trajectory(path)
    with pytest.raises(FileNotFoundError):
        Trajectory.load(str(path))
    assert sorted(tmp_path.rglob("*")) == before


FILES = ["trajectory.h5", "steps/00000001-00000012.h5", "checkpoints/00000006.h5"]


@pytest.mark.parametrize("name", FILES)
def test_a_newer_version_asks_for_an_upgrade(name: str, copy: Path) -> None:
    with h5py.File(copy / name, "r+") as file:
        file.attrs["version"] = 3
    with pytest.raises(TrajectoryFormatError, match=r"version 3.*up to version 2.*Upgrade") as info:
        open_trajectory(copy)
    assert str(copy / name) in str(info.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "another kind"])
def test_a_damaged_file_is_named_when_the_trajectory_opens(
    name: str, damage: str, copy: Path
) -> None:
    file = copy / name
    content = file.read_bytes()
    if damage == "another kind":
        shutil.copy(copy / "curvature" / "0af3.h5", file)
    else:
        file.write_bytes(
            {"truncated": content[: len(content) // 2], "empty": b"", "text": b"hello"}[damage]
        )
    expected = "is not a" if damage == "another kind" else "is damaged"
    with pytest.raises(TrajectoryFormatError, match=expected) as info:
        open_trajectory(copy)
    assert str(file) in str(info.value)


def test_corrupted_numbers_are_noticed(copy: Path) -> None:
    trajectory = open_trajectory(copy)
    file = copy / "checkpoints" / "00000006.h5"
    content = bytearray(file.read_bytes())
    weight = trajectory.checkpoints[6].parameters["net.0.weight"].numpy().tobytes()
    content[content.index(weight) + 7] ^= 1
    file.write_bytes(content)
    with pytest.raises(TrajectoryFormatError, match="damaged") as info:
        trajectory.checkpoints[6]
    assert str(file) in str(info.value)
    assert trajectory.checkpoints[12].step == 12


def test_missing_files_are_named(copy: Path) -> None:
    layout.checkpoint_file(copy, 0).unlink()
    with pytest.raises(TrajectoryFormatError, match=r"00000000\.h5 is missing"):
        open_trajectory(copy)


def test_missing_steps_are_named(copy: Path) -> None:
    layout.steps_file(copy, 1, 12).unlink()
    with pytest.raises(TrajectoryFormatError, match="expected the steps 1 to 12, got 1 to 0"):
        open_trajectory(copy)


def test_mutated_files_give_the_truth_or_our_error(recorded: Path, tmp_path: Path) -> None:
    truth = everything(open_trajectory(recorded))
    names = [p.relative_to(recorded) for p in sorted(recorded.rglob("*.h5"))]
    generator, refused = random.Random(0), 0
    for number in range(48):
        name = names[number % len(names)]
        path = Path(shutil.copytree(recorded, tmp_path / "mutated"))
        content = bytearray((path / name).read_bytes())
        if number % 3 == 0:
            del content[generator.randrange(len(content)) :]
        else:
            for _ in range(generator.choice([1, 1, 8, 64])):
                content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        (path / name).write_bytes(content)
        try:
            found = everything(open_trajectory(path))
            assert all(equal(value, truth[key]) for key, value in found.items()), name
        except TrajectoryError:
            refused += 1
        shutil.rmtree(path)
    assert refused > 20


def test_links_out_of_a_file_are_not_followed(copy: Path, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["tensor"] = np.zeros((5, 3), np.float32)
        file["tensor"].attrs["dtype"] = "float32"
    with h5py.File(layout.checkpoint_file(copy, 6), "r+") as file:
        del file["parameters/net.0.weight"]
        file["parameters/net.0.weight"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "tensor")
    with pytest.raises(TrajectoryFormatError, match=r"no 'net\.0\.weight'"):
        open_trajectory(copy).checkpoints[6]


# Curvature.


def test_curvature_is_kept_by_its_key(copy: Path) -> None:
    curvature = open_trajectory(copy).curvature
    assert list(curvature) == ["0af3"]
    with pytest.raises(KeyError):
        curvature["beef"]
    curvature["beef"] = {"a": torch.eye(2), "b": torch.ones(3, dtype=torch.float64)}
    again = open_trajectory(copy).curvature
    assert sorted(again) == ["0af3", "beef"]
    assert again["beef"].keys() == {"a", "b"}
    assert again["beef"]["b"].dtype == torch.float64
    del again["0af3"]
    assert len(curvature) == 1
    for key in ("../evil", "ABC", ""):
        with pytest.raises(ValueError, match="hexadecimal"):
            curvature[key] = {}


def test_curvature_that_cannot_be_kept_is_said(copy: Path) -> None:
    shutil.rmtree(copy / "curvature")
    (copy / "curvature").write_text("in the way")
    curvature = open_trajectory(copy).curvature
    with pytest.warns(UserWarning, match="curvature is not kept"):
        curvature["beef"] = {"a": torch.eye(2)}
    assert "beef" not in curvature


def test_damaged_curvature_is_named(copy: Path) -> None:
    (copy / "curvature" / "0af3.h5").write_bytes(b"hello")
    with pytest.raises(TrajectoryFormatError, match=r"0af3\.h5 is damaged"):
        open_trajectory(copy).curvature["0af3"]


# Fingerprints.


def test_the_recorded_data_are_recognised() -> None:
    recorded = fingerprint(Numbered(200))
    assert recorded is not None
    assert len(recorded) == 65
    assert recorded["length"] == "200"
    assert {"0", "199"} < recorded.keys()
    compare_fingerprints(recorded, Numbered(200))
    compare_fingerprints(None, Numbered(3))


def test_other_data_are_refused() -> None:
    recorded = fingerprint(Numbered(30))
    with pytest.raises(TrajectoryMismatchError, match="expected 30 examples, got 31"):
        compare_fingerprints(recorded, Numbered(31))
    changed = Numbered(30)
    changed.y[4] += 1e-6
    changed.x[17] = 0
    with pytest.raises(TrajectoryMismatchError, match=r"30 recorded .* 2 differ, at indices 4, 17"):
        compare_fingerprints(recorded, changed)
    with pytest.raises(TrajectoryMismatchError, match="30 differ.* and 20 more"):
        compare_fingerprints(recorded, Numbered(30, seed=1))


def test_augmented_data_are_compared_by_length() -> None:
    recorded = fingerprint(Numbered(30, augment=True))
    assert recorded == {"length": "30"}
    compare_fingerprints(recorded, Numbered(30))
    compare_fingerprints(fingerprint(Numbered(30)), Numbered(30, augment=True))


def test_reading_for_a_fingerprint_leaves_all_generators_alone() -> None:
    class Own(Numbered):
        def __init__(self) -> None:
            super().__init__(augment=True)
            self.parts = {"noise": [torch.Generator(), np.random.default_rng(0), random.Random(0)]}

        def __getitem__(self, index: int) -> Any:
            noise, numpy, python = self.parts["noise"]
            return torch.rand(1, generator=noise), numpy.random(), python.random()

    dataset = Own()
    states = []
    for _ in range(2):
        noise, numpy, python = dataset.parts["noise"]
        states.append(
            (
                torch.get_rng_state().tolist(),
                random.getstate(),
                np.random.get_state()[1].tolist(),  # noqa: NPY002
                noise.get_state().tolist(),
                str(numpy.bit_generator.state),
                python.getstate(),
            )
        )
        fingerprint(dataset)
    assert states[0] == states[1]


def test_data_that_cannot_be_read_by_position() -> None:
    class Broken(Numbered):
        def __getitem__(self, index: int) -> Any:
            if index == 3:
                raise OSError("a broken picture, which the sampler leaves out")
            return super().__getitem__(index)

    assert fingerprint(Stream()) is None
    recorded = fingerprint(Broken())
    assert recorded is not None
    assert len(recorded) == 22
    assert "3" not in recorded
    with pytest.raises(TrajectoryMismatchError, match="at indices 3"):
        compare_fingerprints(fingerprint(Numbered()), Broken())


def test_digests_tell_contents_apart() -> None:
    a = torch.tensor([1.0, 2.0])
    values = [
        a,
        a.double(),
        a.bfloat16(),
        a[:1],
        a[None],
        [1.0, 2.0],
        (1.0, 2.0),
        np.array([1.0, 2.0]),
        {"a": 1},
        {"a": 2},
        {"b": 1},
        [["a"], "b"],
        [["a", "b"]],
        "ab",
        b"ab",
        1,
        True,
        None,
        {1, 2},
        ParameterFact((1,), "a", 0),
        ParameterFact((2,), "a", 0),
    ]
    digests = [digest(value) for value in values]
    assert len(set(digests)) == len(values)
    assert digests == [digest(value) for value in values]


# Inspection.


def show(path: Path) -> str:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(description_table(describe(path)))
    return console.export_text()


def test_inspect_shows_what_is_there(copy: Path) -> None:
    (copy / "scores").mkdir()
    (copy / "scores" / "source.h5").write_bytes(b"scores")
    text = show(copy)
    for expected in (
        "AdamW",
        "checkpoint 12",
        "weights and optimizer",
        "0af3",
        "source.h5",
        "2 jumps",
    ):
        assert expected in text
    assert "whole" in text
    assert "yes" in text
    description = describe(copy)
    assert description.problems == ()
    assert description.size == sum(p.stat().st_size for p in copy.rglob("*") if p.is_file())


def test_inspect_says_what_is_broken(copy: Path) -> None:
    file = layout.checkpoint_file(copy, 6)
    file.write_bytes(file.read_bytes()[:-100])
    (copy / "steps" / "00000013-00000014.h5.part").write_bytes(b"")
    text = show(copy)
    assert "damaged" in text
    assert "00000006.h5 is damaged" in text
    assert "unfinished" in text
    assert len(describe(copy).problems) == 2
    with pytest.raises(TrajectoryNotFoundError):
        description_table(describe(copy / "steps"))


def test_no_array_is_stored_with_the_time_of_day(tmp_path):
    """The same content is the same file, whenever it is written."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for size in (3, 10_000):
            stored = put_array(file, str(size), np.arange(size))
            assert not stored.id.get_create_plist().get_obj_track_times()
