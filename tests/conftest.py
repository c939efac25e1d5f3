"""Quiet, single-threaded tests: waking a second thread takes longer than all their work."""

from __future__ import annotations

import logging

import torch

torch.set_num_threads(1)
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)
logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
