"""The README and docs/ say what is true: their Python runs, their commands and links exist."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning.cli import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Pages whose Python runs, in the order in which a reader would come to them: later ones use what
# earlier ones have recorded.
RUN = ["callback.md", "start.md", "estimators.md", "edits.md", "recording.md", "unlearn.md"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


class Tiny(LightningModule):
    """What a reader of the README brings along."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, inputs):
        return self.layer(inputs)

    def training_step(self, batch, batch_index):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(LightningDataModule):
    def __init__(self, dataset):
        super().__init__()
        self.dataset = dataset

    def train_dataloader(self):
        return DataLoader(self.dataset, batch_size=5, shuffle=True)


def python_of(name):
    """The Python on a page of docs/, or in the README."""
    path = ROOT / name if name == "README.md" else ROOT / "docs" / name
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def what_a_reader_has():
    dataset = TensorDataset(torch.randn(20, 3), torch.arange(20) % 2)
    tuning = TensorDataset(torch.randn(15, 3), torch.arange(15) % 2)
    return {
        "module": Tiny(),
        "datamodule": Data(dataset),
        "train_dataset": dataset,
        "query_dataset": TensorDataset(torch.randn(4, 3), torch.arange(4) % 2),
        "new_module": Tiny,
        "new_data": lambda seed: Data(dataset),
        "tuning_dataset": tuning,
        "tuning_data": Data(tuning),
    }


def test_the_readme_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = what_a_reader_has()
    (example,) = python_of("README.md")
    exec(compile(example, "README.md", "exec"), names)
    assert names["scores"].self_influence.shape == (20,)
    (home,) = python_of("index.md")
    exec(compile(home.replace("runs/mine", "runs/home"), "index.md", "exec"), names)


def test_the_python_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = what_a_reader_has()
    for name in RUN:
        examples = python_of(name)
        assert examples, name
        for example in examples:
            exec(compile(example, name, "exec"), names)
        if name == "callback.md":
            scores = names["scores"]
            assert scores.values.shape == (4, 20)
            torch.testing.assert_close(scores.by_segment.sum(0), scores.values)
            assert (tmp_path / "scores.h5").is_file()
        if name == "recording.md":
            assert names["averaged"].spread.shape == (4, 20)
            assert names["scores"].values.shape == (4, 35)
            assert names["scores"].stage(0).values.shape == (4, 20)
    assert names["exact"].values.shape == (4, 20)
    assert names["exact"].provenance["certificate"]["bit_equal"]
    assert names["fast"].candidates.shape == (4, 5)
    assert names["edited"].values.shape == (4, 4)
    assert isinstance(names["forgetful"], Tiny)


def test_the_commands_exist():
    """docs/experiments.md has one line for each command; the README shows a few of them."""
    every = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^tda (\w+)", every, flags=re.MULTILINE)) == set(COMMANDS)
    used = [
        command
        for page in PAGES
        for command in re.findall(r"^tda (\w+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert set(used) <= set(COMMANDS)


def test_the_readme_is_one_screen():
    assert len(README.splitlines()) <= 70, "details belong on a page of docs/"


def test_it_opens_with_the_two_commands():
    assert re.search(r"\A# .*\n\n```\nmake demo .*\nmake test ", README)


def anchors_of(page):
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if link.startswith("http"):
                continue
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor and target.suffix == ".md":
                assert anchor in anchors_of(target), f"{page.name}: {link}"


def test_the_files_that_pages_name_exist():
    for page in [*PAGES, *sorted((ROOT / "experiments").glob("*/README.md"))]:
        for name in re.findall(r"`((?:\w+/)+\w+\.py)`", page.read_text(encoding="utf-8")):
            places = [ROOT, ROOT / "tda_lightning", page.parent]
            assert any((place / name).is_file() for place in places), f"{page}: {name}"
