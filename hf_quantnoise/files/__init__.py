"""Files: those of a checkpoint are read safely, new ones are complete whenever they exist."""
