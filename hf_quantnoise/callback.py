"""``QuantNoiseCallback``: all state of noise training, for this package's trainer or any other."""

from __future__ import annotations

import logging
import math
import os

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .configuration import NOISE_CONFIG_NAME, QuantNoiseConfig
from .noise import apply_quant_noise, find_state

logger = logging.getLogger(__name__)

STATE_NAME = "quant_noise_state.safetensors"

# Steps after which layers that no noise has reached are told of: with LayerDrop, or with experts,
# a layer may well rest for a few.
REACH_STEPS = 8


class QuantNoiseCallback(TrainerCallback):
    """Injects noise when training begins and refreshes its codebooks and scales while it runs.

    Works with any ``Trainer`` (``trainer.add_callback(QuantNoiseCallback(config))``): TRL,
    sentence-transformers, or one's own. Checkpoints hold the config and the codebooks beside the
    weights, and a resumed run goes on with them.

    Args:
        config: which noise; see :class:`QuantNoiseConfig`.
    """

    def __init__(self, config: QuantNoiseConfig) -> None:
        if not isinstance(config, QuantNoiseConfig):
            raise TypeError(
                f"config is a {type(config).__name__}; give a QuantNoiseConfig, e.g. "
                "QuantNoiseConfig(noise='proxy', p=0.1)"
            )
        self.config = config
        self._restored = False
        self._begun_at = 0

    def prepare(self, model: nn.Module) -> None:
        """Applies the noise where the model has none yet."""
        if find_state(model) is None:
            apply_quant_noise(model, self.config)

    def save(self, model: nn.Module, folder: str | os.PathLike) -> None:
        """Writes the config and the fitted codebooks and scales into a checkpoint folder."""
        state = find_state(model)
        if state is None or not os.path.isdir(folder):
            return
        tensors = {name: tensor.contiguous() for name, tensor in state.state_dict().items()}
        if tensors:
            save_file(tensors, os.path.join(folder, STATE_NAME))
        self.config.save_pretrained(folder)  # last: load() goes by it

    def missing_from(self, folder: str | os.PathLike, model: nn.Module) -> str | None:
        """The file of :meth:`save` that a checkpoint lacks, and a resumed run would have to make
        up for; None where there is none."""
        state = find_state(model)
        if state is None or not state.state_dict():
            return None
        names = (STATE_NAME, NOISE_CONFIG_NAME)
        return next((n for n in names if not os.path.isfile(os.path.join(folder, n))), None)

    def load(self, model: nn.Module, folder: str | os.PathLike) -> None:
        """Reads what :meth:`save` wrote; a folder without it leaves the model as it is.

        Raises:
            ValueError: if the checkpoint was trained with another noise.
        """
        state = find_state(model)
        if state is None or not os.path.isfile(os.path.join(folder, NOISE_CONFIG_NAME)):
            return
        stored = QuantNoiseConfig.from_pretrained(folder)
        if stored != state.config:
            raise ValueError(
                f"resume_from_checkpoint={os.fspath(folder)!r} was trained with "
                f"{stored.noise!r} noise and other settings than this run's "
                f"{state.config.noise!r}; take its config, "
                f"QuantNoiseConfig.from_pretrained({os.fspath(folder)!r})"
            )
        file_name = os.path.join(folder, STATE_NAME)
        if os.path.isfile(file_name):
            state.load_state_dict(load_file(file_name))
        self._restored = self.missing_from(folder, model) is None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ):
        """Applies the noise; in a resumed run, reads the checkpoint's codebooks.

        Raises:
            ValueError: if layers are to share weights that the optimizer holds already.
        """
        model = kwargs["model"]
        if self.config.share_layers != 1 and find_state(model) is None:
            raise ValueError(
                f"share_layers={self.config.share_layers!r}: the optimizer holds the weights of "
                "every layer already; call QuantNoiseCallback.prepare(model) before the trainer is "
                "made"
            )
        self.prepare(model)
        self._begun_at = state.global_step
        if state.global_step > 0:
            folder = _checkpoint(args, state)
            if not self._restored:  # what was read from another folder stays
                self.load(model, folder)
            if not self._restored and find_state(model).state_dict():
                logger.warning(
                    "resumed at step %d, but %s holds no quantization noise: codebooks and scales "
                    "are fitted anew. If the checkpoint lies elsewhere, call "
                    "callback.prepare(model) and callback.load(model, its_folder) before train()",
                    state.global_step,
                    folder,
                )
        self._restored = False  # a later run reads its own checkpoint

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Refreshes the codebooks once per epoch (section 4.2)."""
        noise = find_state(kwargs["model"])
        begins = state.global_step > 0
        if state.global_step == self._begun_at:
            # A run resumed inside an epoch passes here too, with codebooks of its beginning.
            begins = begins and math.isclose(state.epoch, round(state.epoch))
        if noise is not None and begins and self.config.codebook_update == "epoch":
            noise.refresh_codebooks()

    def on_step_begin(self, args, state, control, **kwargs):
        """Sets the rates by their schedule; refreshes codebooks and scales that are due."""
        noise, step = find_state(kwargs["model"]), state.global_step
        if noise is None:
            return
        if self.config.p_schedule != "constant":
            noise.p = self.config.p_at(step)
        if step == 0:
            return
        every = self.config.codebook_update
        if every != "epoch" and step % every == 0:
            noise.refresh_codebooks()
        if step % self.config.scale_update_steps == 0:
            noise.refresh_scales()

    def on_step_end(self, args, state, control, **kwargs):
        """Lets all ranks know the ranges that each has watched, before a checkpoint is written;
        after a few steps says which layers no noise reaches."""
        noise = find_state(kwargs["model"])
        if noise is None:
            return
        noise.share_ranges()
        if state.global_step == REACH_STEPS:
            noise.note_unreached()

    def on_train_end(self, args, state, control, **kwargs):
        """Says which layers no noise has reached in the whole run."""
        if (noise := find_state(kwargs["model"])) is not None:
            noise.note_unreached()

    def on_save(self, args, state, control, **kwargs):
        """Writes the noise's state into the checkpoint that was just saved."""
        if args.should_save:  # on each machine, with save_on_each_node
            self.save(kwargs["model"], _checkpoint(args, state))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> str:
    return os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
