"""Flags of noise and compressed model, shared by all scripts that train."""

from __future__ import annotations

from dataclasses import make_dataclass

from ..configuration import QuantNoiseConfig
from ..configuration.flags import QuantizationFlags, config_from_flags, flag_of
from ..configuration.options import options_of

# Option of QuantNoiseConfig -> its flag. SHARED options are those of the compressed model, as are
# FALLBACKS if their flag is not passed.
NOISE_FLAGS = {
    "noise": "noise",
    "p": "noise_rate",
    "p_schedule": "noise_schedule",
    "block_size": "noise_block_size",
    "n_centroids": "noise_n_centroids",
    "block_selection": "noise_block_selection",
    "observer": "noise_observer",
    "layerdrop": "layerdrop",
    "layerdrop_ste": "layerdrop_ste",
    "codebook_update": "codebook_update",
    "learn_codebooks": "learn_codebooks",
    "scale_update_steps": "scale_update_steps",
    "batch_norm_batches": "noise_batch_norm_batches",
    "activation_calibration": "activation_calibration",
    "target_modules": "noise_target_modules",
    "exclude_modules": "noise_exclude_modules",
}
FALLBACKS = ("block_size", "n_centroids", "observer")
SHARED = (
    "activation_bits", "share_layers", "codebook_bits", "row_scale", "n_codebooks",
    "frequent_rows", "rare_block_size",
)  # fmt: skip


def _noise_flags() -> list[tuple]:
    options, flags = options_of(QuantNoiseConfig), []
    for name, flag in NOISE_FLAGS.items():
        more = {"default": None, "more": f"Default: --{name}."} if name in FALLBACKS else {}
        if name == "noise":
            more = {"more": "'none' trains without noise."}
        flags.append(flag_of(options[name], flag, **more))
    return flags


class ConfigFlags(make_dataclass("_Flags", _noise_flags(), bases=(QuantizationFlags,))):
    """Flags of noise and compressed model."""

    def noise_config(self, seed: int) -> QuantNoiseConfig | None:
        """Return the noise to train with; None for ``--noise none``."""
        if self.noise == ["none"]:
            return None
        values = vars(self)
        flags = {**NOISE_FLAGS, **{name: name for name in SHARED}}
        for name in FALLBACKS:
            if values[flags[name]] is None:
                flags[name] = name
        return config_from_flags(QuantNoiseConfig, flags, values, seed)
