"""Makes the helpers of tests/ and of this directory importable however pytest is started."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
for directory in (HERE, HERE.parent):
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
