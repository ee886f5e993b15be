"""Scaling laws of compressed language models: fits with honest uncertainty, and what follows from them.

from qpipe.laws import fit, read_losses
result = fit(read_losses("losses.parquet"), law="compression", bootstrap=1000, seed=0)
result.multipliers["w4a4"]          # eff, low, high, n_runs
result.predict(n=1e9, d=2e10, representation="w4a4")
"""

from qpipe.laws.catalogue import LAWS, get_law
from qpipe.laws.fit import fit
from qpipe.laws.multipliers import multiplier_table, write_multipliers
from qpipe.laws.parameters import Parameter, Prior, parse_priors, parse_settings
from qpipe.laws.result import Fit
from qpipe.laws.table import read_losses

__all__ = [
    "LAWS",
    "Fit",
    "Parameter",
    "Prior",
    "fit",
    "get_law",
    "multiplier_table",
    "parse_priors",
    "parse_settings",
    "read_losses",
    "write_multipliers",
]
