"""Many students of one teacher under other settings: which are the best, and what they cost."""

from importlib.util import find_spec

from distill_nlp.errors import UsageError

if missing := [name for name in ("optuna", "matplotlib") if find_spec(name) is None]:
    raise UsageError(f"a sweep needs {' and '.join(missing)}: pip install 'distill-nlp[sweep]'")

from distill_nlp.sweep.plan import Sweep, SweepPlan, load_sweep
from distill_nlp.sweep.runner import run_sweep
from distill_nlp.sweep.tables import terminal_table

__all__ = ["Sweep", "SweepPlan", "load_sweep", "run_sweep", "terminal_table"]
