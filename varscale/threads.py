"""How the CPU threads of one process behave beside others: they sleep while they wait."""

import os


def wait_politely() -> None:
    """Let OpenMP's threads sleep at barriers, unless the user decided otherwise; call it before torch is imported.

    By default they spin. Beside the loader's threads, a second rank or another user's job the spinning takes the cores
    from those who have work: on two shared cores a training step took eight times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
