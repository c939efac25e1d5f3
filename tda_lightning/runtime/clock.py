"""The clock of rehearsals: seconds from any start. A test exchanges it."""

from __future__ import annotations

import time

now = time.perf_counter
