"""Model cards and uploads to the Hub."""

from .card import QuantNoiseCard
from .push import push_to_hub, write_model_card

__all__ = ["QuantNoiseCard", "push_to_hub", "write_model_card"]
