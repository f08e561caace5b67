"""How good a backbone is without a classifier of its own: nearest neighbours, and a linear classifier on its features.

The features are the pooled ones of images that are prepared for evaluation. The vote of the neighbours is that of DINO
(Caron et al., arXiv 2104.14294, `eval_knn.py`): the 20 nearest training images by cosine, each with the weight
exp(cosine / 0.07). The linear classifier is that of DINOv2 (Oquab et al., arXiv 2304.07193, appendix B): SGD with
momentum and without weight decay, a cosine schedule, and several learning rates side by side; here on features of plain
images, and the rate is chosen on a tenth of the training images and not on those that are reported.
"""

from typing import Any
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.optim import create_optimizer_v2
from timm.utils import distribute_bn
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ..base.console import progress
from ..base.errors import InputError

__all__ = ['PROBES', 'extract_features', 'knn_accuracy', 'linear_accuracy']

NUM_NEIGHBOURS, TEMPERATURE = 20, 0.07
SIMILARITIES = 1 << 25  # of one block
LINEAR_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1., 3.)
LINEAR_EPOCHS, LINEAR_BATCH = 100, 256

Features = tuple[torch.Tensor, torch.Tensor]  # float32 [N, D] and labels int64 [N], of labelled images


@torch.inference_mode()
def extract_features(
        model: nn.Module,
        normalize: nn.Module,
        loader: DataLoader,
        accelerator: Accelerator,
        stopped: Callable[[], Any] = bool,
) -> Features | None:
    """Pooled features of the labelled images of all ranks, on this rank's device; None where any rank broke off.

    Args:
        model: The bare model.
        normalize: Normalises uint8 views on the device.
        loader: This rank's part of a split.
        accelerator: Knows the device and the other ranks.
        stopped: Whether to break off.

    Raises:
        InputError: The model has no pooled features, or no image has a label.
    """
    model.eval()
    if accelerator.num_processes > 1:
        # What is evaluated is what is exported: rank 0's statistics, where each rank has some of its own.
        distribute_bn(model, accelerator.num_processes)
    found: list[tuple[torch.Tensor, torch.Tensor]] | None = []
    for batch in progress(loader, desc='features', unit='batch', leave=False):
        if stopped():
            found = None
            break
        with accelerator.autocast():
            vectors = model.forward_head(
                model.forward_features(normalize(batch['view'].to(accelerator.device))), pre_logits=True)
        if vectors.ndim != 2:
            raise InputError(f'the features of the model are {list(vectors.shape[1:])} for an image, expected one '
                             f'vector; choose a model with a pooled one')
        is_labelled = batch['label'] >= 0
        found.append((vectors.float().cpu()[is_labelled], batch['label'][is_labelled]))
    parts = gather_object([found])
    if None in parts:
        return None
    parts = [batch for part in parts for batch in part]
    vectors, labels = (torch.cat(column).to(accelerator.device) for column in zip(*parts))
    if not len(labels):
        raise InputError('no image has a label, by which features are compared; check --target-key')
    return vectors, labels


@torch.inference_mode()
def knn_accuracy(train: Features, val: Features) -> dict[str, float]:
    """`knn` and `knn_top5`, accuracy of the vote of the nearest neighbours in percent.

    Args:
        train: Features and labels of the images that vote.
        val: Those of the images that are classified.
    """
    (known, classes), (vectors, labels) = train, val
    known, vectors = F.normalize(known, dim=1), F.normalize(vectors, dim=1)
    num_classes = int(max(classes.max(), labels.max())) + 1
    top1 = top5 = 0
    for part in torch.arange(len(labels)).split(max(1, SIMILARITIES // len(known))):
        cosine, near = (vectors[part] @ known.T).topk(min(NUM_NEIGHBOURS, len(known)), dim=1)
        votes = torch.zeros(len(part), num_classes, device=known.device)
        votes.scatter_add_(1, classes[near], (cosine / TEMPERATURE).exp())
        is_right = votes.topk(min(5, num_classes), dim=1).indices == labels[part, None]
        top1, top5 = top1 + is_right[:, 0].sum().item(), top5 + is_right.sum().item()
    return {'knn': 100 * top1 / len(labels), 'knn_top5': 100 * top5 / len(labels)}


def linear_accuracy(train: Features, val: Features, seed: int = 0) -> dict[str, float]:
    """`linear`, accuracy of a linear classifier in percent, and `linear_lr`, the learning rate that was chosen.

    Args:
        train: Features and labels that it is trained on.
        val: Those that it is evaluated on.
        seed: Of its order of samples.
    """
    mean, std = train[0].mean(dim=0), train[0].std(dim=0).clamp(min=1e-6)
    (known, classes), (vectors, labels) = (((part - mean) / std, names) for part, names in (train, val))
    num_classes = int(max(classes.max(), labels.max())) + 1
    # Every tenth image chooses the rate, whatever order the classes have.
    held = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed)).to(known.device) % 10 == 0
    rates = LINEAR_RATES
    if 0 < held.sum() < len(held):
        trained = _train_linear(known[~held], classes[~held], num_classes, rates, seed)
        rates = (rates[_accuracies(trained, known[held], classes[held]).argmax()],)
    trained = _train_linear(known, classes, num_classes, rates, seed)
    accuracies = _accuracies(trained, vectors, labels)
    best = accuracies.argmax()
    return {'linear': accuracies[best].item(), 'linear_lr': rates[best]}


def _train_linear(
        known: torch.Tensor,
        classes: torch.Tensor,
        num_classes: int,
        rates: tuple[float, ...],
        seed: int,
) -> list[nn.Linear]:
    """A linear classifier for each learning rate, which is for 256 samples, all on the same batches."""
    layers = [nn.Linear(known.shape[1], num_classes, device=known.device) for _ in rates]
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    batch_size = min(LINEAR_BATCH, len(known))
    groups = [{'params': list(layer.parameters()), 'lr': rate * batch_size / LINEAR_BATCH}
              for layer, rate in zip(layers, rates)]
    optimizer = create_optimizer_v2(groups, opt='sgd', lr=rates[0], momentum=0.9, weight_decay=0.)
    num_steps = LINEAR_EPOCHS * (len(known) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    order = torch.Generator().manual_seed(seed)
    for _ in range(LINEAR_EPOCHS):
        batches = torch.randperm(len(known), generator=order).to(known.device).split(batch_size)
        for rows in batches[:len(known) // batch_size]:
            loss = sum(F.cross_entropy(layer(known[rows]), classes[rows]) for layer in layers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return layers


@torch.inference_mode()
def _accuracies(layers: list[nn.Linear], vectors: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Top-1 accuracy of each in percent, [L]."""
    return torch.stack([100 * (layer(vectors).argmax(dim=1) == labels).float().mean() for layer in layers])


PROBES = {'knn': knn_accuracy, 'linear': linear_accuracy}
