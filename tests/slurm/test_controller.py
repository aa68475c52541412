"""A job whose ranks were told to stop while Slurm's controller is away."""

import shlex
import sys

import pytest

from varscale.cluster.submission import Run, Submission
from varscale.engine.stopping import PREEMPTED


@pytest.mark.slow
def test_the_controller_is_away(cluster, repository, tmp_path):
    """The end of a first start, PREEMPTED, comes while nobody answers; the second start ends well."""
    run = Run("run", tmp_path / "run", tmp_path / "0.yaml", total_steps=10)
    submission = Submission(tmp_path, "slurm", 1, 1, idle_requeues=3, runs=[run])
    submission.save()
    impatient = tmp_path / "slurm.conf"  # scontrol waits for seconds rather than half a minute
    impatient.write_text((cluster.root / "slurm.conf").read_text() + "MessageTimeout=2\n")
    program = f"{shlex.quote(sys.executable)} -m varscale.cluster.job"
    script = f"""
        export PYTHONPATH={repository} SLURM_CONF={impatient} VARSCALE_SUBMISSION={tmp_path} VARSCALE_RUN=0
        export VARSCALE_JOB=$SLURM_JOB_ID VARSCALE_START=${{SLURM_RESTART_COUNT:-0}}
        {program} begin > {tmp_path}/begun.$VARSCALE_START
        [ $VARSCALE_START = 1 ] && exec {program} end 0
        until [ -e {tmp_path}/stopped ]; do sleep 0.1; done
        {program} end {PREEMPTED}
    """
    log = tmp_path / "log"
    job = cluster.ask("sbatch", "--parsable", "--requeue", f"--output={log}", "--open-mode=append", "--wrap", script)
    cluster.wait_for((tmp_path / "begun.0").exists, 20)
    cluster.stop_controller()
    try:
        (tmp_path / "stopped").touch()
        cluster.wait_for(lambda: "cannot be requeued yet: scontrol: " in log.read_text(), 60)
    finally:
        cluster.start_controller()
    cluster.wait_for(lambda: submission.end(job.strip()) is not None, 60, "for the job's end")
    assert submission.end(job.strip())["reason"] == "done"
    assert len(submission.starts(job.strip())) == 2
