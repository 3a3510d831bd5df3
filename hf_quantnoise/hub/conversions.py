"""Names of tensors in files, for models whose checkpoints transformers renames or converts.

Some models store their tensors in another form than they compute with: NomicBERT's file has one
tensor for q, k and v. Codes cannot be converted like weights, so packed tensors have the model's
own names in the files, and so have dense weights that would be fused with a packed one. All other
tensors are stored as in the dense model's files.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator
from functools import cache

from transformers import PreTrainedModel

from ..compat import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    get_model_conversion_mapping,
    set_weight_conversions,
    weight_conversions_on_save,
)
from ..configuration import QuantizedModelConfig
from ..dynamic_subclass import DynamicSubclass, make_dynamic_subclass
from ..modeling import packed_layers
from ..modeling.packed import INDICES, INPUT_NAMES, PREFIX
from ..sharing import parents_of


class _Names(frozenset):
    """Names of tensors; transformers deep-copies conversions for each tensor it converts."""

    def __deepcopy__(self, memo: dict) -> _Names:
        return self


class _PartialConversion(DynamicSubclass):
    """Mixin of conversions that leave some tensors as they are, in both directions."""

    kept = _Names()

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if source_key in self.kept:
            return source_key, None
        return super().rename_source_key(source_key)

    def reverse_transform(self) -> WeightTransform:
        return _except_for(super().reverse_transform(), self.kept)


@cache
def _partial_class(cls: type) -> type:
    return make_dynamic_subclass("Partial", cls, (_PartialConversion, cls), _partial_class)


def _except_for(conversion: WeightTransform, kept: _Names) -> WeightTransform:
    """Return a copy of a conversion that leaves the tensors of these names as they are."""
    cls = _partial_class(getattr(conversion, "original_class", type(conversion)))
    copy = cls.__new__(cls)
    for slot in (slot for base in cls.__mro__ for slot in getattr(base, "__slots__", ())):
        setattr(copy, slot, getattr(conversion, slot))
    copy.kept = kept
    return copy


def without(conversions: Iterable[WeightTransform], kept: Iterable[str]) -> list[WeightTransform]:
    """Return conversions that leave the tensors of these names as they are."""
    kept = _Names(kept)
    return [_except_for(conversion, kept) for conversion in conversions]


def convert_dense_only(model: PreTrainedModel, sentinels: Iterable[str] = ()) -> None:
    """Make ``save_pretrained`` leave the packed tensors of a model, and sentinels, as they are."""
    if any(packed_layers(model)) and (conversions := weight_conversions_on_save(model)):
        kept = {*names_to_keep(model), *sentinels}
        set_weight_conversions(model, without(conversions, kept))


def convert_all(model: PreTrainedModel) -> None:
    """Undo :func:`convert_dense_only`, for a model that is dense again."""
    if conversions := weight_conversions_on_save(model):
        set_weight_conversions(model, without(conversions, ()))


def names_to_keep(model: PreTrainedModel) -> set[str]:
    """Return the names of tensors that are not converted: see the docstring of the module."""
    # Those of the model, since a loaded one only knows the conversions of tensors in its files.
    converters = [
        conversion.reverse_transform()
        for conversion in get_model_conversion_mapping(model, add_legacy=False)
        if isinstance(conversion, WeightConverter)
    ]

    def fused(weight: str) -> str | None:
        """Return the name of the tensor that a weight becomes a part of."""
        renamed = (converter.rename_source_key(weight) for converter in converters)
        return next((name for name, pattern in renamed if pattern is not None), None)

    packed = list(packed_layers(model))
    kept = {
        f"{name}.{key}"
        for name, layer in packed
        for key in layer.tensors()
        if key.startswith(PREFIX) or key in INPUT_NAMES
    }
    fused_with_packed = {fused(f"{name}.weight") for name, _ in packed} - {None}
    if fused_with_packed:
        kept |= {name for name, _ in model.named_parameters() if fused(name) in fused_with_packed}
    return kept


def names_kept_in_files(
    model: PreTrainedModel, config: QuantizedModelConfig, known: Collection[str]
) -> set[str]:
    """Return the names of tensors in the files, of ``known``, that are not converted on loading.

    ``model`` is the skeleton, of any class; ``config`` that of the files. Files of earlier releases
    have packed tensors under converted names, which are converted back.
    """
    converts = get_model_conversion_mapping(model, add_legacy=False)
    if not converts or not has_names_of_plan(config, known):
        return set()
    own = {spelling for name in names_to_keep(model) for spelling in spellings(model, name)}
    sentinels = {f"{name}.weight" for name in config.plan}
    return (own | sentinels).intersection(known)


def has_names_of_plan(config: QuantizedModelConfig, stored: Container[str]) -> bool:
    """Return whether all codes are stored under the names that their layers have in the plan."""
    found = {name for name in config.plan if f"{name}.{INDICES}" in stored}
    return not any(not_stored(config, found))


def not_stored(config: QuantizedModelConfig, found: Iterable[str]) -> Iterator[str]:
    """Yield the layers of the plan that have codes neither in ``found`` nor from another layer."""
    shared = config.shared_layers.keys()
    weights = {config.plan[name].get("tied_to", name) for name in found}
    for name, entry in config.plan.items():
        if entry.get("tied_to", name) not in weights and shared.isdisjoint(parents_of(name)):
            yield name


def spellings(model: PreTrainedModel, name: str) -> tuple[str, str, str]:
    """Return a name as it is, without and with the base model's prefix."""
    prefix = f"{model.base_model_prefix}."
    return name, name.removeprefix(prefix), prefix + name


def renamings_of(model: PreTrainedModel) -> list[WeightRenaming]:
    """Return the renamings of a model's tensors, without conversions of their values."""
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    return [each for each in conversions if isinstance(each, WeightRenaming)]


def renamed_layer(name: str, renamings: Iterable[WeightRenaming]) -> str:
    """Return the name that renamings give to a layer, from that of one of its tensors."""
    renamed = f"{name}.{INDICES}"
    for renaming in renamings:
        renamed, _ = renaming.rename_source_key(renamed)
    return renamed.removesuffix(f".{INDICES}")
