"""Recorded routing: traces, the simulator, a model of time, activation matrices, priors hooks."""

from moeinf.traces.csv_import import read_csv
from moeinf.traces.eam import EAMC
from moeinf.traces.simulator import SimulationResult, policy_names, simulate
from moeinf.traces.time_model import TimeEstimate, estimate_time
from moeinf.traces.trace import Trace

__all__ = [
    "EAMC",
    "SimulationResult",
    "TimeEstimate",
    "Trace",
    "estimate_time",
    "policy_names",
    "read_csv",
    "simulate",
]
