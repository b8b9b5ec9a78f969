"""Replays one schedule of the simulation, and prints what happened, line by line.

    cd tests && ../.venv/bin/python -m simulation --seed 1234

`pytest tests/simulation --seed 1234` replays it, too, and shows the trace if an invariant breaks. `--mutation NAME`
breaks the system on purpose first (simulation/mutations.py); without `--seed` it looks for a seed that shows it.
`--statistics 1000` lives through that many and says what they contain. `--from 200000` begins there.
"""

from __future__ import annotations

import sys

from simulation.mutations import MUTATIONS
from simulation.replay import Simulation, replay
from simulation.schedule_statistics import told
from simulation.world import run, trace

assert __doc__ is not None
sys.exit(replay(Simulation("python -m simulation", __doc__.splitlines()[0], MUTATIONS, run, trace, told)))
