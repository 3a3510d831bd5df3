"""The trainer of a stage, and what it needs under FSDP and for pending noise."""
