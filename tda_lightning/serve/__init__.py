"""A small HTTP service over an index: post a query, get the training examples that caused it.

It needs FastAPI and uvicorn (the extra ``serve``), which are imported when the service is started.
"""

from tda_lightning.serve.limits import Limits

__all__ = ["Limits"]
