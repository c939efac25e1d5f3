"""What stands twice in the repository says the same."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
VERSION = re.search(r'^version = "(.+)"', PROJECT, re.MULTILINE)[1]


def read(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_every_supported_python_and_the_oldest_torch_are_tested():
    job = read(".github/workflows/test.yaml")["jobs"]["test"]
    runs = job["strategy"]["matrix"]["include"]
    supported = re.findall(r"Programming Language :: Python :: (3\.\d+)", PROJECT)
    assert {run["python"] for run in runs} == set(supported)
    oldest = re.search(r'"torch>=([\d.]+)"', PROJECT)[1]
    assert any(f"torch=={oldest}.*" in run["pins"] for run in runs)


def test_the_site_is_built_with_what_the_extra_names():
    """The workflow installs no more than the site needs, at the same versions."""
    steps = read(".github/workflows/test.yaml")["jobs"]["docs"]["steps"]
    (install,) = [step["run"] for step in steps if "pip install" in step.get("run", "")]
    asked = re.findall(r"'([^']+)'", install)
    extra = re.search(r"^docs = \[(.*?)\]", PROJECT, re.MULTILINE | re.DOTALL)[1]
    assert asked and set(asked) <= set(re.findall(r'"([^"]+)"', extra))


def test_one_version():
    assert read("CITATION.cff")["version"] == VERSION
    assert f"## {VERSION}" in (ROOT / "docs" / "releases.md").read_text(encoding="utf-8")


def test_extras_that_messages_and_pages_name_exist():
    table = PROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", table, re.MULTILINE))
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("tda_lightning/**/*.py")]
    named = {
        extra
        for page in pages
        for group in re.findall(r"tda-lightning\[([\w,]+)\]", page.read_text(encoding="utf-8"))
        for extra in group.split(",")
    }
    assert named and named <= extras


def test_no_hook_is_fetched_from_elsewhere():
    assert {repo["repo"] for repo in read(".pre-commit-config.yaml")["repos"]} == {"local"}
