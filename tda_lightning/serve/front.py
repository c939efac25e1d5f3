"""The page at the service's address: one file, which runs nothing but its own script."""

from __future__ import annotations

from importlib.resources import files

from tda_lightning.runtime.digests import script_digest


def _page() -> tuple[bytes, str]:
    own = files("tda_lightning.serve") / "page"
    # The report's own look.
    report = files("tda_lightning.report") / "templates" / "style.css"
    style = report.read_text("utf-8") + (own / "page.css").read_text("utf-8")
    script = (own / "page.js").read_text("utf-8")
    page = (own / "page.html").read_text("utf-8")
    page = page.replace("/* style */", style).replace("/* script */", script)
    policy = (
        "default-src 'none'; img-src data:; media-src data:; connect-src 'self'; "
        f"style-src 'sha256-{script_digest(style)}'; script-src 'sha256-{script_digest(script)}'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page.encode(), policy


PAGE, PAGE_POLICY = _page()
