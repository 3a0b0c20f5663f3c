"""What must be known of other people's models, and nothing else."""
