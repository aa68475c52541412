"""A submission: one job or job array for one or several runs, kept in a folder of its own beside what the runs make.

RUN/slurm/TIME/submission.json     what was submitted; of a sweep, RUN is the folder that holds its runs
RUN/slurm/TIME/code/               the snapshot of the program that runs
RUN/slurm/TIME/configs/K.yaml      the resolved configuration of run K
RUN/slurm/TIME/JOB_RANK_log.out    what a rank printed in all starts of the job; rank 0's holds the job's words, too
RUN/slurm/TIME/JOB.START/          how ranks ended in that start of the job (see start.py)
RUN/slurm/TIME/JOB.end.json        how the job ended
"""

import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import varscale
from varscale.config import Config, to_yaml
from varscale.engine.manifest import REVISION, git_revision
from varscale.engine.rundir import SUBMISSIONS
from varscale.errors import UserError
from varscale.files import replace_text


@dataclass(frozen=True)
class Run:
    """One run of a submission: `config` is a YAML file in the submission's folder."""

    name: str
    directory: Path
    config: Path
    total_steps: int


@dataclass
class Submission:
    """What was submitted. `job` is Slurm's number, or the id of the process that leads a job on this machine."""

    folder: Path
    cluster: str
    nodes: int
    ranks_per_node: int
    idle_requeues: int
    runs: list[Run] = field(default_factory=list)
    job: str | None = None

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    def job_of(self, number: int) -> str:
        """The name of run `number`'s job: that of the whole, or of a task of the array."""
        return f"{self.job}_{number}" if len(self.runs) > 1 else str(self.job)

    @property
    def jobs(self) -> list[str]:
        """The names of all runs' jobs."""
        return [self.job_of(number) for number in range(len(self.runs))]

    def log(self, job: str, rank: int = 0) -> Path:
        return self.folder / f"{job}_{rank}_log.out"

    def end(self, job: str) -> dict | None:
        """How a job ended (`code` and `reason`); None while it has not, or did not come to say so."""
        path = self.folder / f"{job}.end.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def starts(self, job: str) -> list[Path]:
        """The folders of a job's starts, the first start first."""
        return sorted(self.folder.glob(f"{job}.[0-9]*"), key=lambda path: int(path.suffix[1:]))

    def save(self) -> None:
        values = asdict(self) | {"folder": None}
        replace_text(self.folder / "submission.json", json.dumps(values, indent=1, default=str))

    @classmethod
    def load(cls, folder: Path) -> "Submission":
        values = json.loads((folder / "submission.json").read_text())
        runs = [Run(r["name"], Path(r["directory"]), Path(r["config"]), r["total_steps"]) for r in values.pop("runs")]
        return cls(**values | {"folder": folder, "runs": runs})


def new_folder(run: Path) -> Path:
    """Make the folder of a new submission."""
    parent = run.absolute() / SUBMISSIONS
    name = time.strftime("%Y%m%d-%H%M%S")
    taken = len(list(parent.glob(f"{name}*")))
    folder = parent / (f"{name}-{taken}" if taken else name)
    (folder / "configs").mkdir(parents=True)
    return folder


def submissions_of(run: Path) -> list[Submission]:
    """The submissions of a run, or of the sweep it belongs to, the newest last."""
    for place in (run, run.absolute().parent):
        found = [Submission.load(path.parent) for path in sorted((place / SUBMISSIONS).glob("*/submission.json"))]
        if place != run:
            found = [s for s in found if any(r.directory == run.absolute() for r in s.runs)]
        if found:
            return found
    return []


def snapshot(folder: Path) -> Path:
    """Copy the package, so that later edits do not reach a queued or requeued job.

    Compiled code goes with them, and fits, for the files keep their times: ranks need not compile it once more.
    """
    package, code = Path(varscale.__file__).parent, folder / "code"
    ignored = shutil.ignore_patterns(".*", "*.tmp.*", "*.pyc.*")  # the latter two are just being written
    shutil.copytree(package, code / package.name, ignore=ignored)
    (code / REVISION).write_text(f"{git_revision() or ''}\n")
    return code


def write_config(folder: Path, number: int, config: Config) -> Path:
    """Write the resolved configuration of a run, with a DeepSpeed JSON of the user's own beside it."""
    own = Path(config.deepspeed.config)
    if own.suffix == ".json":
        copy = folder / "configs" / f"{number}-{own.name}"
        shutil.copy(own, copy)
        config = config.model_copy(update={"deepspeed": config.deepspeed.model_copy(update={"config": str(copy)})})
    path = folder / "configs" / f"{number}.yaml"
    path.write_text(to_yaml(config))
    return path


def find(target: str | Path) -> Submission:
    """The newest submission of a run's directory; UserError where there is none."""
    if found := submissions_of(Path(target)):
        return found[-1]
    what = "no job was submitted for it" if Path(target).is_dir() else "there is no such run"
    raise UserError(f"{target}: {what}")
