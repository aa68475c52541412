"""What a job asks of the cluster: slurm/cluster.yaml and the options of slurm/submit.py, checked like a recipe."""

import difflib
import re
from pathlib import Path

import yaml
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, field_validator

from varscale.config.section import Section
from varscale.errors import UserError

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<fields>\d+(?::\d+){0,2})")


class ClusterSettings(Section):
    """One key for each option of slurm/submit.py; slurm/cluster.yaml says what they mean."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str = "24:00:00"
    nodes: PositiveInt = 1
    gpus_per_node: NonNegativeInt = 0
    ranks_per_node: PositiveInt | None = None
    cpus_per_rank: PositiveInt | None = None
    memory_gb: PositiveFloat | None = None
    signal_delay: PositiveInt = 120
    idle_requeues: NonNegativeInt = 3
    setup: tuple[str, ...] = ()
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict)

    @field_validator("time", mode="before")
    @classmethod
    def _readable(cls, time: object) -> str:
        if not isinstance(time, str):
            raise ValueError(f"write {time!r} in quotes: YAML takes 24:00:00 for a number, too")
        minutes(time)
        return time

    @property
    def ranks(self) -> int:
        """Ranks on a node: one for each GPU unless told otherwise."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks


def load_settings(path: Path, options: dict[str, object]) -> ClusterSettings:
    """The defaults of a YAML file, overridden by options; UserError names an unknown key and the nearest one."""
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no mapping of keys to values")
    try:
        return ClusterSettings.model_validate(values | options)
    except ValidationError as error:
        raise UserError(_explain(error.errors()[0], path, options)) from None


def minutes(time: str) -> int:
    """A time limit as Slurm writes it (minutes, MM:SS, HH:MM:SS, D-HH[:MM[:SS]]), in minutes, rounded up."""
    found = _TIME.fullmatch(time)
    if not found:
        raise ValueError(f"time is {time!r}; write minutes, HH:MM:SS or D-HH:MM:SS")
    parts = [int(part) for part in found["fields"].split(":")]
    if found["days"]:
        parts.insert(0, int(found["days"]))
    else:
        parts = [0, *([] if len(parts) == 3 else [0]), *parts]
    days, hours, mins, seconds = (*parts, 0, 0, 0)[:4]
    return (days * 24 + hours) * 60 + mins + (seconds > 0)


def _explain(error: dict, path: Path, options: dict[str, object]) -> str:
    key = str(error["loc"][0])
    place = f"--{key.replace('_', '-')}" if key in options else f"{path}: {key}"
    if error["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, ClusterSettings.model_fields, 1, 0)
        return f"{path}: unknown key {key!r}; nearest: {nearest[0]}"
    if error["type"] == "value_error":
        return f"{place}: {error['ctx']['error']}"
    return f"{place} is {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"
