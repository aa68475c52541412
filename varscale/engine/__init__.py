"""What carries a training run: ranks, DeepSpeed, optimizers, checkpoints, telemetry."""
