"""Where a study finds the package and the scripts: every study imports this module, so that none needs an installation.

`ROOT` is the project's folder; it goes to the front of the path.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
