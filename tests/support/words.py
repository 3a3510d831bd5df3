"""A tokenizer with one token per word."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from support.tiny import VOCABULARY

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}


def words() -> PreTrainedTokenizerFast:
    """Return a tokenizer that maps w3 to 3."""
    vocabulary = {word: number for number, word in enumerate(SPECIAL.values())}
    vocabulary |= {f"w{number}": number for number in range(len(SPECIAL), VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=32, **SPECIAL,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
