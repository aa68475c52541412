"""What a run is: typed, frozen configuration from a recipe and overrides, checked before anything heavy is imported."""

from varscale.config.batch import BatchSizes, resolve_batch
from varscale.config.loading import load_config, parse_config, parse_section, recipe_names, to_yaml
from varscale.config.objectives import OBJECTIVES, VarConConfig, VSSLConfig
from varscale.config.schema import Config, SafetyConfig
from varscale.config.section import Section
from varscale.config.zero import resolve_deepspeed, zero_stage

__all__ = [
    "OBJECTIVES",
    "BatchSizes",
    "Config",
    "SafetyConfig",
    "Section",
    "VSSLConfig",
    "VarConConfig",
    "load_config",
    "parse_config",
    "parse_section",
    "recipe_names",
    "resolve_batch",
    "resolve_deepspeed",
    "to_yaml",
    "zero_stage",
]
