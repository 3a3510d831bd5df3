"""Distillation from a teacher: logits, hidden states and attention maps."""
