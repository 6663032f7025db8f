"""The helpers of the tests of cloud and device serve these, too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "split"))
