"""The site builds without warnings, and loads nothing from elsewhere."""

import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs" / "_site"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    pytest.importorskip("latex2mathml")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    path = list(sys.path)
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    try:
        build(config)  # strict: a warning is an error
    finally:
        sys.path[:] = path
    return folder


def test_pages_load_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=[\"']?(\w+:)", text)
        assert set(loaded) <= {"data:"}, page.name


def test_every_public_name_has_an_entry(site):
    from tests.docs.test_reference import public_modules

    names = {f"{module.name}.{name}" for module in public_modules() for name in module.names}
    text = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    anchors = set(re.findall(r"id=\"?(tda_lightning[\w.]+)", text))
    assert not names - anchors


def test_formulas_and_roles_are_no_source_text(site):
    text = (site / "api" / "tda_lightning.estimators.html").read_text(encoding="utf-8")
    assert "<math" in text
    assert ":class:`" not in text and ".. math::" not in text


def test_all_messages_are_listed():
    """Needs no mkdocs: the list is read from the source."""
    sys.path.insert(0, str(SITE))
    try:
        found = list(import_module("messages").messages(ROOT))
    finally:
        sys.path.pop(0)
    assert len(found) > 600
    assert any(error == "FileExistsError" and "already holds" in text for error, _, text in found)
