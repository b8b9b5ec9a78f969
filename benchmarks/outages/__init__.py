"""Jobs of several agents on this machine that are disturbed on purpose, and what their workers' own logs say of it.

What belongs here: starting such jobs, ours and torchrun's, the disturbances, and figures from the logs. The agents
and the controller are started by the harness that the tests use.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tests"))
