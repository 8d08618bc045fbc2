"""A run on the nodes of a SLURM job."""
