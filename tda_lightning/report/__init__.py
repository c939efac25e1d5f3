"""The report: one HTML file that shows scores (``write_report``) and how examples look in it."""

from tda_lightning.records.rendered import Rendered, Renderer
from tda_lightning.report.dataset_renderer import DatasetRenderer
from tda_lightning.report.interactions import Interactions, interactions
from tda_lightning.report.page import write_report

__all__ = [
    "DatasetRenderer",
    "Interactions",
    "Rendered",
    "Renderer",
    "interactions",
    "write_report",
]
