"""From the 21,841 classes of ImageNet-22k to the 1,000 of ImageNet-1k.

TinyViT is pretrained on ImageNet-22k. The paper evaluates such a classifier on ImageNet-1k without training it
further, and starts its fine-tuning from the rows of the classifier that belong to the 1,000 classes. The classes are
matched by timm's synset lists. One class of ImageNet-1k is absent from ImageNet-22k.
"""

from functools import lru_cache

import torch
from timm.data import ImageNetInfo
from torch import nn

__all__ = ['imagenet1k_in_22k', 'logits_22k_to_1k', 'classifier_22k_to_1k']

NUM_CLASSES_22K = 21841


@lru_cache
def imagenet1k_in_22k() -> tuple[int, ...]:
    """Index in ImageNet-22k of each of the 1,000 classes of ImageNet-1k, -1 where it is absent."""
    indices = {synset: i for i, synset in enumerate(ImageNetInfo('imagenet22k').label_names())}
    return tuple(indices.get(synset, -1) for synset in ImageNetInfo('imagenet-1k').label_names())


def _take_rows(rows: torch.Tensor, absent: torch.Tensor) -> torch.Tensor:
    # index -1 takes the last row
    return torch.cat([rows, absent])[torch.tensor(imagenet1k_in_22k(), device=rows.device)]


def _check_num_classes(num_classes: int) -> None:
    if num_classes != NUM_CLASSES_22K:
        raise ValueError(f'Found {num_classes} classes, but ImageNet-22k has {NUM_CLASSES_22K}.')


def logits_22k_to_1k(logits: torch.Tensor) -> torch.Tensor:
    """Scores for ImageNet-1k from the logits of an ImageNet-22k classifier, as the paper evaluates it.

    Args:
        logits: Logits [..., 21841].

    Returns:
        Logits [..., 1000]; a class that ImageNet-22k lacks scores zero.

    Raises:
        ValueError: If there are not 21,841 classes.
    """
    _check_num_classes(logits.shape[-1])
    logits = logits.movedim(-1, 0)
    return _take_rows(logits, torch.zeros_like(logits[:1])).movedim(0, -1)


@torch.no_grad()
def classifier_22k_to_1k(model: nn.Module) -> nn.Module:
    """Turn a timm model's ImageNet-22k classifier into one for ImageNet-1k, where the paper's fine-tuning starts.

    Each class keeps its own weights; a class that ImageNet-22k lacks gets the mean of the others'.

    Args:
        model: Any timm model whose classifier is linear with 21,841 outputs; changed in place.

    Returns:
        The model, with 1,000 classes.

    Raises:
        ValueError: If the classifier is not linear or has not 21,841 outputs.
    """
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear):
        raise ValueError(f'The classifier is a {type(classifier).__name__}, but must be a Linear layer.')
    _check_num_classes(classifier.out_features)
    present = torch.tensor([i for i in imagenet1k_in_22k() if i >= 0], device=classifier.weight.device)

    model.reset_classifier(len(imagenet1k_in_22k()))
    for name, rows in classifier.named_parameters():
        getattr(model.get_classifier(), name).copy_(_take_rows(rows, rows[present].mean(0, keepdim=True)))
    return model
