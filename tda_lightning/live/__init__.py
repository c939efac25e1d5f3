"""Attribution as part of training: a report at its end."""

from tda_lightning.live.tda_report import TdaReport

__all__ = ["TdaReport"]
