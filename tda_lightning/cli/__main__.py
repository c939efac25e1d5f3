"""``python -m tda_lightning.cli`` is ``tda``."""

import sys

from tda_lightning.cli import main

sys.exit(main())
