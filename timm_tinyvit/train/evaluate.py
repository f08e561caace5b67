"""Accuracy of a model on a validation set, with images prepared as timm's validate.py prepares them.

Resize, crop and normalisation come from the model's configuration, changed by the flags. A classifier of ImageNet-22k
is looked at on the labels of ImageNet-1k as in the paper: by its scores for those 1,000 classes.
"""

import argparse
from pathlib import Path
from typing import Any
from collections.abc import Callable

import datasets
import torch
from accelerate import Accelerator
from timm.data import create_transform
from timm.utils import distribute_bn
from torch import nn
from torch.utils.data import DataLoader, Subset

from ..base.console import best_effort, progress, warning
from ..base.errors import InputError
from ..base.launch import caller_settings, create_accelerator, init_worker
from ..data.classes import (
    Classes, check_labels, checkpoint_names, class_mismatch, is_imagenet1k, match_classes, matched_split, valid_names,
)
from ..data.dataset import ImageDataset, collate
from ..data.sources import as_split, find_column, load_split
from ..models.config_file import image_config, read_config
from ..models.imagenet22k import NUM_CLASSES_22K, logits_22k_to_1k
from ..models.loading import Normalize, config_beside
from ..models.saving import export_model
from .metrics import rank_of, suffixed
from .predictions import Recorder, keep_evaluation
from .probe import PROBES, extract_features, knn_accuracy
from .student import create_student

# Training images whose neighbours a training looks for.
MAX_NEIGHBOURS = 50_000

__all__ = ['Evaluator', 'accuracy', 'eval_config', 'eval_loader', 'evaluate', 'evaluate_checkpoint', 'load_validation']


def load_validation(args: argparse.Namespace) -> datasets.Dataset | None:
    """The validation split; None where a student without classes has none to be compared by."""
    try:
        return load_split(
            args.val_dataset or args.dataset, args.val_split, is_training=False, label_column=args.target_key)
    except InputError:
        if args.num_classes != 0 or args.val_dataset or args.val_split:
            raise
        return None


def eval_config(
        args: argparse.Namespace,
        model: nn.Module,
        size: tuple[int, int] | None = None,
        use_test_size: bool = False,
) -> dict[str, Any]:
    """How images are prepared for evaluation.

    Args:
        args: The flags, which change the configuration.
        model: The model, whose configuration it is.
        size: Height and width in place of the configuration's.
        use_test_size: Take size and crop that the configuration has for tests, where it has some of their own.
    """
    flags = {'crop_pct': args.crop_pct, 'crop_mode': args.crop_mode, 'interpolation': args.interpolation or ''}
    if size is not None:
        flags['input_size'] = (3, *size)
    return image_config(model, args=flags, use_test_size=use_test_size)


def eval_loader(
        dataset: datasets.Dataset,
        config: dict[str, Any],
        args: argparse.Namespace,
        rank: int,
        world_size: int,
) -> DataLoader:
    """This rank's part of a validation set, as uint8 batches.

    Raises:
        InputError: timm does not make the transform.
    """
    try:
        transform = create_transform(
            config['input_size'], crop_pct=config['crop_pct'], crop_mode=config['crop_mode'],
            interpolation=config['interpolation'], normalize=False)
    except (KeyError, ValueError) as error:
        raise InputError(f'timm cannot make the evaluation transform: {error!r}; check --interpolation')
    data = ImageDataset(dataset, transform, args.input_key, args.target_key)
    return DataLoader(
        Subset(data, range(rank, len(data), world_size)), batch_size=args.validation_batch_size or args.batch_size,
        num_workers=args.workers, collate_fn=collate, generator=torch.Generator(), worker_init_fn=init_worker)


class Evaluator:
    """Evaluates and exports one set of weights after another, at the size of the training views.

    Args:
        args: The flags of the trainer.
        student: The student, whose configuration says how images are prepared.
        size: Height and width of the images.
        val_set: The validation split; None where there are no classes to evaluate.
        classes: Its classes.
        accelerator: Knows the processes.
        folder: Of the run; takes the exported models, and the predictions for the report.
        train_set: The training split, by whose nearest neighbours a student without classes is evaluated.
    """

    def __init__(
            self,
            args: argparse.Namespace,
            student: nn.Module,
            size: tuple[int, int],
            val_set: datasets.Dataset | None,
            classes: Classes,
            accelerator: Accelerator,
            folder: Path,
            train_set: datasets.Dataset | None = None,
    ):
        self.config = eval_config(args, student, size)
        self.normalize = Normalize(self.config['mean'], self.config['std']).to(accelerator.device)
        self.loader = None if val_set is None else eval_loader(
            val_set, self.config, args, accelerator.process_index, accelerator.num_processes)
        self.neighbours = None
        if val_set is not None and not classes.num:
            chosen = train_set.select(range(0, len(train_set), -(-len(train_set) // MAX_NEIGHBOURS)))
            self.neighbours = eval_loader(
                chosen, self.config, args, accelerator.process_index, accelerator.num_processes)
        self.classes = classes
        self.accelerator = accelerator
        self.folder = folder

    def __call__(
            self,
            model: nn.Module,
            weights: str,
            epoch: int,
            best: tuple[float, float],
            is_due: bool = True,
            stopped: Callable[[], Any] = bool,
    ) -> dict[str, float] | None:
        """Evaluate and export a model; all processes together.

        Args:
            model: The bare model, whole.
            weights: Whose weights it has: `student` or `ema`.
            epoch: Epoch of the training, from 0.
            best: The `rank_of` earlier epochs above which it is exported as the best one.
            is_due: Whether to evaluate it; else it is exported alone.
            stopped: Whether to break off.

        Returns:
            `eval_loss`, `eval_top1` and `eval_top5`, of a student without classes `eval_knn` and `eval_knn_top5`, with
            the suffix of the weights; None where any process broke off.
        """
        metrics, show = {}, self.accelerator.is_main_process
        if is_due and self.neighbours is not None:
            found = [extract_features(model, self.normalize, loader, self.accelerator, stopped)
                     for loader in (self.neighbours, self.loader)]
            if None in found:
                return None
            metrics = knn_accuracy(*found)
        elif is_due and self.loader is not None:
            recorder = Recorder()
            metrics = accuracy(
                model, self.normalize, self.loader, self.accelerator, self.classes.to_imagenet1k, stopped, recorder)
            if metrics is None:
                return None
            predictions = recorder.gather()
            if show:
                with best_effort('the predictions for the report'):
                    keep_evaluation(
                        self.folder / f'{suffixed("predictions", weights)}.npz', predictions, self.loader,
                        recorder.num_classes, epoch)
        row = {suffixed(f'eval_{name}', weights): value for name, value in metrics.items()}
        if show:
            for name in ['last'] + ['best'] * (rank_of(row, weights) > best):
                export_model(self.folder / suffixed(name, weights), model, self.classes.names, self.config)
        return row


@torch.inference_mode()
def accuracy(
        model: nn.Module,
        normalize: Normalize,
        loader: DataLoader,
        accelerator: Accelerator,
        to_imagenet1k: bool = False,
        stopped: Callable[[], bool] = bool,
        recorder: Recorder | None = None,
) -> dict[str, float] | None:
    """Loss, top-1 and top-5 accuracy in percent over the samples of all ranks.

    Args:
        model: The bare model: ranks may have different numbers of batches, and DDP's forward would wait for all.
        normalize: Normalises uint8 views on the device.
        loader: This rank's part of the split.
        accelerator: Sums over the ranks.
        to_imagenet1k: The labels are those of ImageNet-1k, whatever the classifier.
        stopped: Whether to break off.
        recorder: Takes the predictions of this rank's samples.

    Returns:
        `loss`, `top1` and `top5`, or None where any rank broke off.
    """
    model.eval()
    if accelerator.num_processes > 1:
        # What is evaluated is what is exported: rank 0's statistics, where each rank has some of its own.
        distribute_bn(model, accelerator.num_processes)
    device = _device_of(model)
    sums = torch.zeros(5, dtype=torch.float64)  # loss, top-1, top-5, samples, broken off
    for batch in progress(loader, desc='evaluation', unit='batch', leave=False):
        if stopped():
            sums[4] = 1
            break
        labels = batch['label'].to(device)
        with accelerator.autocast():
            logits = model(normalize(batch['view'].to(device)))
        logits = logits.float()
        if to_imagenet1k and logits.shape[1] == NUM_CLASSES_22K:
            logits = logits_22k_to_1k(logits)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # [B, 5]
        loss = nn.functional.cross_entropy(logits, labels, reduction='sum')
        if recorder is not None:
            recorder.add(logits, labels)
        sums[:4] += torch.stack([loss, best[:, 0].sum(), best.sum(), loss.new_tensor(len(labels))]).double().cpu()
    loss, top1, top5, count, broken = accelerator.reduce(sums.to(accelerator.device, torch.float32), 'sum').tolist()
    return None if broken else {'loss': loss / count, 'top1': 100 * top1 / count, 'top5': 100 * top5 / count}


def evaluate_checkpoint(args: argparse.Namespace, accelerator: Accelerator) -> dict[str, float]:
    """Metrics of the weights that are named, or else of the pretrained ones: of `accuracy`, or of each `--probe`.

    Size, crop and normalisation come from the flags, else from the config.json beside the weights, else from the model.

    Raises:
        InputError: There are no such weights, or no labels that fit them.
    """
    with accelerator.main_process_first():
        dataset = load_split(
            args.val_dataset or args.dataset, args.val_split, is_training=False, label_column=args.target_key)
    beside = _images_of(config_beside(args.initial_checkpoint))
    size = tuple(beside['input_size'][-2:]) if 'input_size' in beside else None
    if args.img_size is not None:
        size = (args.img_size, args.img_size)
    model = create_student(args, args.num_classes, size).to(accelerator.device)
    model.pretrained_cfg.update(beside)
    if args.probe:
        config = eval_config(args, model, size, use_test_size=not beside)
        normalize = Normalize(config['mean'], config['std']).to(accelerator.device)
        with accelerator.main_process_first():
            train_set = load_split(args.dataset, args.train_split, is_training=True, label_column=args.target_key)
        found = [extract_features(model, normalize, eval_loader(
            split, config, args, accelerator.process_index, accelerator.num_processes), accelerator)
            for split in (train_set, matched_split(train_set, dataset, args.target_key))]
        return {name: value for probe in args.probe for name, value in PROBES[probe](*found).items()}
    labels = checkpoint_names(args.initial_checkpoint) or model.pretrained_cfg.get('label_names')
    # What lies beside the weights is how they were evaluated; else it is done as in timm's validate.py.
    return _accuracy_on(dataset, model, labels, args, size, not beside, accelerator)


def evaluate(
        model: nn.Module,
        dataset: datasets.Dataset | str | Path,
        *,
        split: str | None = None,
        size: tuple[int, int] | None = None,
        batch_size: int = 128,
        image_column: str | None = None,
        label_column: str | None = None,
        num_workers: int = 0,
) -> dict[str, float]:
    """Accuracy of a classifier on labelled images, resized, cropped and normalised as its configuration says.

    All processes of a launch share the images out. A classifier of ImageNet-22k is scored on the classes of ImageNet-1k
    where the labels are theirs.

    Args:
        model: From normalised images [B, 3, H, W] to logits [B, C], where it is evaluated.
        dataset: A `datasets.Dataset`, or its name or folder, see `load_split`.
        split: Where the data set is named, its split; by default `validation`, `val` or `test`.
        size: Height and width of the images; by default those of the model's configuration.
        batch_size: Images per batch of each process.
        image_column: The image column; found by its usual names by default.
        label_column: The label column, likewise.
        num_workers: Loader processes.

    Returns:
        `loss`, the cross-entropy, and `top1` and `top5` in percent.

    Raises:
        InputError: The labels are not those of the model's classes, or an image cannot be decoded.
    """
    args = argparse.Namespace(
        model=type(model).__name__, input_key=image_column, target_key=label_column, workers=num_workers,
        batch_size=batch_size, validation_batch_size=None, crop_pct=None, crop_mode=None, interpolation=None)
    dataset = as_split(dataset, split, is_training=False)
    labels = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
    was_training = model.training
    with caller_settings():
        try:
            return _accuracy_on(dataset, model, labels, args, size, size is None, create_accelerator())
        finally:
            model.train(was_training)


def _accuracy_on(
        dataset: datasets.Dataset,
        model: nn.Module,
        names: Any,
        args: argparse.Namespace,
        size: tuple[int, int] | None,
        use_test_size: bool,
        accelerator: Accelerator,
) -> dict[str, float]:
    """What `accuracy` is on a split, whose classes are matched with the model's where both have names."""
    config = eval_config(args, model, size, use_test_size)
    num_classes = getattr(model, 'num_classes', None)
    if num_classes is None:
        with torch.no_grad():
            num_classes = model.eval()(torch.zeros(1, *config['input_size'], device=_device_of(model))).shape[-1]
    if not num_classes:
        raise InputError(f'the model {args.model} has no classifier to evaluate; give --probe knn or --probe linear')
    label_column = find_column(dataset, args.target_key, is_image=False)
    names = valid_names(names, num_classes)
    dataset = match_classes(dataset, label_column, names, '--val-split', f'the model {args.model}')
    check_labels(dataset, label_column, num_classes, '--val-split')
    if mismatch := class_mismatch(dataset, label_column, num_classes):
        warning(f'{mismatch}: its accuracy is right only if the labels are the first of its classes')
    loader = eval_loader(dataset, config, args, accelerator.process_index, accelerator.num_processes)
    normalize = Normalize(config['mean'], config['std']).to(_device_of(model))
    return accuracy(model, normalize, loader, accelerator, is_imagenet1k(dataset, label_column))


def _device_of(model: nn.Module) -> torch.device:
    """Where a model is."""
    return next(model.parameters()).device


def _images_of(file: Path | None) -> dict[str, Any]:
    """How a model's images were prepared, by its config.json; empty where there is none."""
    if file is None:
        return {}
    config = read_config(file.parent)
    if 'pretrained_cfg' not in config:
        raise InputError(f'{file} is not the config.json of a timm model; fix or remove it')
    names = ('input_size', 'crop_pct', 'crop_mode', 'interpolation', 'mean', 'std')
    return {name: config['pretrained_cfg'][name] for name in names if name in config['pretrained_cfg']}
