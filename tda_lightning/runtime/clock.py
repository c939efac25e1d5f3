"""The clock of dry runs: seconds from any start. Tests replace it."""

from __future__ import annotations

import time

now = time.perf_counter
