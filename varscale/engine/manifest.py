"""The manifest of a run: everything needed to say later what was run, on what, from which revision."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from varscale.config import Config, to_yaml
from varscale.engine.peaks import Peak
from varscale.errors import UserError
from varscale.files import make_folder, replace_text
from varscale.versions import versions_of

PACKAGES = ("varscale", "torch", "torchvision", "deepspeed", "ffcv", "accelerate", "numpy", "numba")
REVISION = "REVISION"  # in a snapshot of the code: the revision it was made from

# Sections and keys that may differ between a run and its continuation without changing what is computed.
FREE = {"name", "output_dir", "deepspeed", "checkpoint", "safety", "logging", "online_knn"}
FREE_KEYS = {
    "data.dir",
    "data.workers",
    "data.batches_ahead",
    "data.os_cache",
    "data.on_bad_sample",
    "encoder.activation_checkpointing",
}
# So may these where centroids are those of the whole batch, but for what batch normalisations of micro-batches see.
SPLIT_KEYS = {"batch.micro_batch_size", "batch.gradient_accumulation_steps", "batch.max_micro_batch_size"}


def write_manifest(
    config: Config, deepspeed: dict, data_digest: str, *, world_size: int, device: str, peak: Peak | None = None
) -> None:
    """Make the run's directory and write manifest.json and config.yaml into it; a resumed run's starts are listed.

    device: a name for people: a GPU's model, or "cpu". peak: the rate that MFU is a share of, where it is known.
    """
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "world_size": world_size,
        "deepspeed": deepspeed,
        "versions": {"python": platform.python_version()} | versions_of(PACKAGES),
        "git_revision": git_revision(),
        "hardware": _hardware() | {"device": device, "peak": peak and peak._asdict()},
    }
    make_folder(config.output_dir)
    path = config.output_dir / "manifest.json"
    starts = json.loads(path.read_text())["starts"] if path.is_file() else []
    manifest = {
        "config": config.model_dump(mode="json"),
        "seed": config.seed,
        "data_digest": data_digest,
        "starts": [*starts, start],
    }
    replace_text(path, json.dumps(manifest, indent=1))  # first: a folder without it is not taken for a run
    replace_text(config.output_dir / "config.yaml", to_yaml(config))


def refuse_another_run(
    manifest: dict, config: Config, data_digest: str, place: Path, *, same_split: bool = False
) -> None:
    """Raise UserError when the run of `manifest` was made with other settings or data than those now given.

    same_split: also where a batch was split into other micro-batches; centroids of micro-batches want that in any case.
    """
    if manifest["data_digest"] != data_digest:
        raise UserError(f"{place}: was trained on other data (digest {manifest['data_digest']}, now {data_digest})")
    then, now = flatten(manifest["config"]), flatten(config.model_dump(mode="json"))
    differing = [k for k in sorted(then.keys() | now.keys()) if then.get(k) != now.get(k)]
    same_split = same_split or now.get("objective.centroids") == "micro"
    free = FREE_KEYS if same_split else FREE_KEYS | SPLIT_KEYS
    refused = [k for k in differing if k.partition(".")[0] not in FREE and k not in free]
    if refused:
        key = refused[0]
        more = f" (and {len(refused) - 1} more: {', '.join(refused[1:4])})" if len(refused) > 1 else ""
        change = f"{key} is {then.get(key)!r} there, {now.get(key)!r} now"
        raise UserError(f"{place}: belongs to a run of another configuration: {change}{more}")


def flatten(values: dict, prefix: str = "") -> dict[str, object]:
    """Nested sections as one level: {"data": {"dir": x}} -> {"data.dir": x}."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def git_revision() -> str | None:
    """The revision of this code, as its checkout or the snapshot it was copied into says; None where neither does."""
    here = Path(__file__).parent
    recorded = here.parents[1] / REVISION
    if recorded.is_file():
        return recorded.read_text().strip() or None
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _hardware() -> dict:
    found = {"host": platform.node(), "cores": len(os.sched_getaffinity(0)), "processor": _processor()}
    found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return found


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
