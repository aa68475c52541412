"""Which GPU a rank takes, how long collectives wait, and how a rank ends that fails alone."""

import subprocess
import sys
import textwrap

import pytest

from varscale.engine.distributed import gpu_of
from varscale.errors import UserError


def test_a_rank_takes_its_own_gpu_or_the_only_one_it_sees():
    assert [gpu_of(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert [gpu_of(rank, 1) for rank in range(4)] == [0, 0, 0, 0]  # Slurm's --gpus-per-task shows each task its own
    with pytest.raises(UserError, match="rank 2 of this machine has no GPU: there are 2"):
        gpu_of(2, 2)


def run(body: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(body)], capture_output=True, text=True, timeout=120)


def test_gradients_are_waited_for_as_long_as_all_else():
    """DeepSpeed's copy of the default group would have torch's patience, with NCCL that of the watchdog at most."""
    done = run("""
        import torch.distributed as dist
        from varscale.engine import distributed
        distributed.join(watchdog_seconds=5000)
        from deepspeed.utils import groups
        for group in (dist.group.WORLD, groups._get_data_parallel_group()):
            print(dist.get_world_size(group), group._get_backend(distributed.torch.device("cpu")).options._timeout)
        distributed.leave()
    """)
    assert done.stdout.splitlines()[-2:] == ["1 2:46:40"] * 2, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [("sys.exit(2)", 2, ""), ("raise OSError('disk')", 1, "OSError: disk"), ("leave()", 0, "the regular end")],
)
def test_a_rank_that_fails_alone_does_not_wait_at_the_end(ending, code, said):
    done = run(f"""
        import atexit, sys
        import torch.distributed as dist
        from varscale.engine import distributed
        from varscale.engine.stopping import ended_at_once

        def leave(**how):
            distributed.leave(**how)

        distributed.join()
        dist.get_backend = lambda *_: "nccl"  # which waits for the others where gloo does not
        atexit.register(lambda: print("the regular end", file=sys.stderr))
        with ended_at_once():
            try:
                {ending}
            except BaseException:
                leave(together=False)
                raise
    """)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert ("the regular end" in done.stderr) == (code == 0)
