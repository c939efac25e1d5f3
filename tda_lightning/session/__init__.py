"""What an estimator works with: the model, the recorded run and walks over the training set."""

from tda_lightning.session.queries import QueryGradients
from tda_lightning.session.session import Batch, Session
from tda_lightning.session.stage import Stage

__all__ = ["Batch", "QueryGradients", "Session", "Stage"]
