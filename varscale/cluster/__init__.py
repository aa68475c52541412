"""A training as a job: what is submitted, what runs on the nodes, and how a queue is asked. Used by slurm/submit.py."""
