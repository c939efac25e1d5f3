"""Memory that can be taken: cached files count as free, and the limits of a container hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from tda_lightning.runtime import free_memory as module
from tda_lightning.runtime.free_memory import free_memory

GIB = 1 << 30


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, file in (("_MACHINE", "meminfo"), ("_OWN_GROUPS", "own"), ("_GROUPS", "groups")):
        monkeypatch.setattr(module, name, tmp_path / file)
    (tmp_path / "meminfo").write_text(
        "MemTotal: 25165824 kB\nMemFree: 394124 kB\nMemAvailable: 8388608 kB\n"
    )
    return tmp_path


def group(folder: Path, names: tuple[str, str, str], limit: object, held: int, files: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{held}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {files}\n")


def test_cached_files_count_as_free(system: Path) -> None:
    assert free_memory() == 8 * GIB


@pytest.mark.parametrize(
    ("line", "root", "names"),
    [
        ("0::/", "", module._UNIFIED),
        ("0::/job/step", "job", module._UNIFIED),  # the limit is that of the job
        ("0::/not/seen/inside", "", module._UNIFIED),
        ("1:cpu:/\n4:memory:/job", "memory/job", module._FORMER),
    ],
)
def test_limits_of_containers_and_jobs_hold(
    system: Path, line: str, root: str, names: tuple[str, str, str]
) -> None:
    (system / "own").write_text(f"{line}\n")
    group(system / "groups" / root, names, 4 * GIB, 3 * GIB, 2 * GIB)
    assert free_memory() == 3 * GIB
    group(system / "groups" / root, names, 4 * GIB, 5 * GIB, 0)
    assert free_memory() == 0


def test_a_group_without_a_limit_has_that_of_the_machine(system: Path) -> None:
    (system / "own").write_text("0::/\n")
    group(system / "groups", module._UNIFIED, "max", 3 * GIB, 0)
    assert free_memory() == 8 * GIB


def test_a_system_that_does_not_tell_is_taken_to_have_4_gib(
    system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (system / "meminfo").unlink()
    monkeypatch.setattr(module.os, "sysconf_names", {})
    assert free_memory() == 4 * GIB
