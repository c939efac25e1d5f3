"""The report: one HTML file that shows any scores to a reader.

``write_report`` is the verb; ``Rendered`` and ``DatasetRenderer`` say how examples look.
"""

from tda_lightning.records.rendered import DatasetRenderer, Rendered, Renderer
from tda_lightning.report.page import write_report

__all__ = ["DatasetRenderer", "Rendered", "Renderer", "write_report"]
