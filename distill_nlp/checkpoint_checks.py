"""What a checkpoint must hold: a config that agrees with itself, weights for all of it, a vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from distill_nlp.errors import shown

_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
_PICKLES = ("pytorch_model*.bin", "adapter_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_sizes(config: Any, where: str) -> None:
    """Refuses a model without layers, width, heads or vocabulary, and class names that do not match their number.

    Args:
        config: of Transformers.
        where: it stands, for the message.

    Raises:
        ValueError: with the setting.
    """
    for name in _SIZES:
        size = getattr(config, name, None)
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            own = config.attribute_map.get(name, name)
            raise ValueError(f"{where}: {own} must be a whole number of at least 1, got {shown(size)}")
    names = config.id2label
    if names is not None and set(names) != set(range(config.num_labels)):
        raise ValueError(f"{where}: id2label has the classes {shown(sorted(names))}, they must be numbered from 0")


def check_has_safetensors(folder: Path) -> None:
    """Refuses a folder whose weights are pickles: reading one can run whatever code it names.

    Raises:
        ValueError: with what converts them.
    """
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json")):
        return
    if pickles := sorted({file.name for pattern in _PICKLES for file in folder.glob(pattern)}):
        raise ValueError(
            f"its weights are a pickle alone ({', '.join(pickles[:3])}), which can run code when it is read; if you "
            'trust it, convert it to safetensors: python -c "from transformers import '
            "AutoModelForSequenceClassification as M; M.from_pretrained('DIR').save_pretrained('DIR')\""
        )


def check_weights(model: PreTrainedModel, found: dict[str, Any], head_may_be_new: bool) -> None:
    """Refuses weights that are not there, of other shapes, or not finite: Transformers draws them at random.

    Args:
        model: as it was loaded.
        found: its `output_loading_info`.
        head_may_be_new: whether what is above the encoder, its pooler included, may be drawn at random.

    Raises:
        ValueError: with some of their names.
    """
    drawn = [*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])]
    if head_may_be_new:
        encoder = f"{model.base_model_prefix}." if model.base_model is not model else ""
        drawn = [name for name in drawn if name.startswith(encoder) and "pooler" not in name]
    if drawn:
        some = ", ".join(sorted(drawn)[:2])
        raise ValueError(
            f"its weights lack {len(drawn)} tensors that its config asks for, or have them in another shape ({some}); "
            "are they of another model?"
        )
    if bad := [name for name, tensor in model.named_parameters() if not _is_finite(tensor)]:
        raise ValueError(f"{len(bad)} of its weights are not finite, the first is {bad[0]}; it was broken in training")


@torch.no_grad()
def _is_finite(tensor: torch.Tensor) -> bool:
    # A sum is several times quicker than a look at each number; where it overflows, it says nothing.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def check_vocabulary(tokenizer: Any) -> None:
    """Refuses a tokenizer that has its special tokens alone: Transformers makes one where the files are missing.

    Raises:
        ValueError: with what is missing.
    """
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        files = ", ".join(sorted(tokenizer.vocab_files_names.values()))
        raise ValueError(f"it has no tokenizer: none of its files is there ({files})")


def check_embeddings(tokenizer: Any, config: Any, where: str) -> None:
    """Refuses a tokenizer of more ids than the model has embeddings, which ends at the first text that holds one.

    Raises:
        ValueError: with both numbers.
    """
    rows, highest = getattr(config, "vocab_size", None), max(tokenizer.get_vocab().values())
    if rows is not None and highest >= rows:
        raise ValueError(
            f"{where}: its tokenizer has ids up to {highest:,}, and the model {rows:,} embeddings (vocab_size); they "
            "are of different models"
        )
