"""Outputs of loaded models, and checks of what was loaded."""

import torch

FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys")


@torch.no_grad()
def output(model, inputs):
    return model.eval()(**inputs)[0]


def require_loaded(loaded):
    """Return the model of (model, loading info) after a check that no key was missing or unused."""
    model, info = loaded
    assert not any(info[fault] for fault in FAULTS), info
    return model
