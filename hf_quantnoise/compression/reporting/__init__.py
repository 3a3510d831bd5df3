"""Records, logs and plots of a compression run."""
