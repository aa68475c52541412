"""What can be measured on a frozen encoder: one evaluator a file, and here the table of them.

An evaluator is a module of its name with a frozen class `Settings` (a `varscale.config.Section`), whose keys and
defaults are those of the command line, and a function `run(context, settings) -> Result`, which every rank calls. Where
it has a picture, a function `draw(details) -> matplotlib Figure` makes it of the result's details; where settings may
be wrong in ways that only the disk can tell, `check(settings)` raises UserError before anything is measured. Another
evaluator is one more file and one more line. Scikit-learn and matplotlib are imported inside functions: --help does
without.
"""

from importlib import import_module
from types import ModuleType

from pydantic import create_model

from varscale.config import Section

NAMES = (
    "knn",
    "linear",
    "linear_cached",
    "classifier",
    "few_shot",
    "clustering",
    "transfer",
    "corruption",
    "calibration",
    "alignment_uniformity",
    "dispersion",
    "embedding_plot",
)
EVALUATORS: dict[str, ModuleType] = {name: import_module(f"{__name__}.{name}") for name in NAMES}

Settings = create_model(
    "Settings", __base__=Section, **{name: (module.Settings, module.Settings()) for name, module in EVALUATORS.items()}
)
"""The settings of all evaluators, each under its name."""
