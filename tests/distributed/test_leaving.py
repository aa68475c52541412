"""No rank ends before the last checkpoint is written: launchers end those that outlive another."""

from pathlib import Path

from varscale.engine.rundir import latest_checkpoint


def test_ranks_wait_for_the_last_checkpoint(run_ranks, small_run, tmp_path):
    run, worker = tmp_path / "run", Path(__file__).with_name("leaving_worker.py")
    arguments = ["--config", "digits-varcon", *small_run, f"output_dir={run}"]
    ends = run_ranks(str(worker), 2, tmp_path / "ranks", *arguments)
    assert [code for code, _ in ends] == [0, 0]
    written = (latest_checkpoint(run).parent / "latest").lstat().st_mtime
    assert min(left for _, left in ends) >= written
