"""``nn.Conv1d``: the convolutions of Whisper, Wav2Vec2 and Mamba (not transformers' ``Conv1D``)."""

from torch import nn

from .convolution import convolution_type
from .record import register_layer_type

register_layer_type(convolution_type(nn.Conv1d))
