"""Small models that between them hold every way a parameter can enter a loss.

``CASES`` is data: a test loops over it. Every model takes one tensor with the example axis first,
is in float64 and in eval mode, and no example's output depends on another example.
"""

from tests.cases.attention import ATTENTION
from tests.cases.bare import BARE
from tests.cases.case import Case
from tests.cases.layers import LAYERS
from tests.cases.recurrent import RECURRENT
from tests.cases.shared import SHARED
from tests.cases.traps import TRAPS
from tests.cases.wiring import WIRING

CASES: list[Case] = [*LAYERS, *ATTENTION, *RECURRENT, *BARE, *WIRING, *SHARED, *TRAPS]
assert len({case.name for case in CASES}) == len(CASES)

__all__ = ["CASES", "Case"]
