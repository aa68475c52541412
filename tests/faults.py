"""A rank whose loss becomes NaN at chosen steps: everything else about it is real."""

from pathlib import Path


def rank_main(arguments: list[str], rank: int, ranks: int, port: int, log: Path, *, bad: tuple[int, ...]) -> None:
    """As torture's, but on the last rank the loss of the `bad` steps, counted from 1 since its start, is NaN."""
    from torture import rank_main as real_rank_main

    from varscale.engine.learners import VarConLearner

    real_loss, step = VarConLearner.loss, 0

    def loss(self, forward, batch):
        nonlocal step
        step += 1
        loss, terms = real_loss(self, forward, batch)
        return (
            (loss, terms | {"kl": terms["kl"] * float("nan")}) if step in bad and rank == ranks - 1 else (loss, terms)
        )

    VarConLearner.loss = loss
    real_rank_main(arguments, rank, ranks, port, log)
