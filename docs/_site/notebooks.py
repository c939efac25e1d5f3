"""A notebook with its outputs as Markdown. Nothing is run, and nothing is loaded from elsewhere."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any


def as_markdown(path: Path) -> str:
    """The cells of the notebook at ``path``, with their stored outputs."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = ["<!-- notebook -->"]
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts += [f'<div class="notebook-output">{_shown(o)}</div>' for o in cell["outputs"]]
    parts.append(f"[Download this notebook]({path.name}){{ download }}")
    return "\n\n".join(parts) + "\n"


def _shown(output: dict[str, Any]) -> str:
    """One output as HTML, the richest form that it has."""
    if output["output_type"] == "stream":
        return _text("".join(output["text"]))
    if output["output_type"] == "error":
        raise ValueError(f"A notebook holds an error: {output['ename']}: {output['evalue']}")
    data = {kind: "".join(value) for kind, value in output["data"].items()}
    if "image/png" in data:
        encoded = data["image/png"].replace("\n", "")
        return f'<img alt="Output of the cell above" src="data:image/png;base64,{encoded}">'
    if "text/html" in data:
        return "".join(line.strip() for line in data["text/html"].splitlines())
    return _text(data["text/plain"])


def _text(text: str) -> str:
    # An empty line would end the block for Markdown.
    return f"<pre>{html.escape(text.rstrip()).replace(chr(10), '&#10;')}</pre>"
