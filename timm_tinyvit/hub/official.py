"""The checkpoints of the paper: their files, their published accuracies with the source, and their cards.

The accuracies are those of the official model zoo (microsoft/Cream, TinyViT/README.md); none is measured here. A
checkpoint is known by the name of its file.
"""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard

from .model_card import (
    CITATION, accuracy_results, evaluation_command, model_facts, model_metadata, render_card,
)

__all__ = ['OFFICIAL_CHECKPOINTS', 'OfficialCheckpoint', 'converted_card', 'find_checkpoint']

SOURCE = 'https://github.com/microsoft/Cream/tree/main/TinyViT'
# That of the official code and model zoo.
LICENSE = 'mit'
IMAGENET_1K, IMAGENET_22K = 'ILSVRC/imagenet-1k', 'timm/imagenet-22k-wds'
TEACHER = 'clip_vit_large_patch14_224.in22k'
# Published images per second; the model zoo names a V100 for one of them.
PUBLISHED_SPEED = {
    'tiny_vit_5m_224': 3060, 'tiny_vit_11m_224': 2468, 'tiny_vit_21m_224': 1571, 'tiny_vit_21m_384': 394,
    'tiny_vit_21m_512': 167}
# Images per second of this package's class and of timm's own, by benchmarks/model_speed.py: as in docs/results.md.
SPEED = {'tiny_vit_5m_224': (51.3, 15.3), 'tiny_vit_11m_224': (54.1, 31.1), 'tiny_vit_21m_224': (17.8, 8.7)}


@dataclass(frozen=True)
class OfficialCheckpoint:
    """A file of the official model zoo.

    Attributes:
        file: Its name there.
        tag: Name of the model, with timm's tag for the weights.
        top1: Published top-1 accuracy on ImageNet-1k in percent; None where none is.
        top5: The same for the five most probable classes.
        steps: The recipes of this package that lead to it, by the paper, each with what it does.
        base: Tag of the checkpoint that it was fine-tuned from, or a repo of the Hub.
    """
    file: str
    tag: str
    top1: float | None = None
    top5: float | None = None
    steps: tuple[tuple[str, str], ...] = ()
    base: str | None = None

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.tag.partition('.')[0]

    @property
    def knows_imagenet22k(self) -> bool:
        """Whether images of ImageNet-22k had a part in it."""
        return 'in22k' in self.tag


def _official_checkpoints() -> list[OfficialCheckpoint]:
    checkpoints = []
    # Size, then top-1 and top-5 from scratch and from ImageNet-22k.
    for size, scratch, tuned in (
        ('5m', (79.1, 94.8), (80.7, 95.6)),
        ('11m', (81.5, 95.8), (83.2, 96.5)),
        ('21m', (83.1, 96.5), (84.8, 97.3)),
    ):
        name = f'tiny_vit_{size}'
        steps = (
            (f'in22k_distill_{name}', 'pretraining on ImageNet-22k from the predictions of the teacher, 90 epochs'),
            (f'in22k_to_in1k_{name}', 'fine-tuning on ImageNet-1k from the labels, 30 epochs'))
        checkpoints += [
            OfficialCheckpoint(f'{name}_22k_distill.pth', f'{name}_224.dist_in22k', steps=steps[:1]),
            OfficialCheckpoint(f'{name}_22kto1k_distill.pth', f'{name}_224.dist_in22k_ft_in1k', *tuned, steps,
                               base=f'{name}_224.dist_in22k'),
            OfficialCheckpoint(f'{name}_1k.pth', f'{name}_224.in1k', *scratch, (
                (f'in1k_{name}', 'training on ImageNet-1k from the labels with Mixup and CutMix, 300 epochs'),))]
    for pixels, before, accuracies in ((384, 224, (86.2, 97.8)), (512, 384, (86.5, 97.9))):
        steps += ((f'in1k_tiny_vit_21m_{pixels}', f'fine-tuning at {pixels} pixels from the labels, 30 epochs'),)
        checkpoints.append(OfficialCheckpoint(
            f'tiny_vit_21m_22kto1k_{pixels}_distill.pth', f'tiny_vit_21m_{pixels}.dist_in22k_ft_in1k', *accuracies,
            steps, base=f'tiny_vit_21m_{before}.dist_in22k_ft_in1k'))
    return [*checkpoints, OfficialCheckpoint(
        'clip_vit_large_patch14_22k.pth', TEACHER, 85.894, 97.566, base='openai/clip-vit-large-patch14')]


OFFICIAL_CHECKPOINTS = tuple(_official_checkpoints())


def find_checkpoint(file: str, name: str) -> OfficialCheckpoint | None:
    """The official checkpoint that a file with weights of a model is, by its name; None where it is another."""
    return next((item for item in OFFICIAL_CHECKPOINTS if (item.file, item.name) == (file, name)), None)


def converted_card(folder: Path, source: str, checkpoint: OfficialCheckpoint | None, repo: str) -> ModelCard:
    """The card of converted weights.

    Args:
        folder: Has their config.json.
        source: Name of the file that they come from.
        checkpoint: Which official checkpoint that is, if it is one.
        repo: ORG/NAME, or what stands for it.
    """
    model = model_facts(folder)
    results, data_sets = [], []
    if checkpoint is not None:
        data_sets = [IMAGENET_1K] if model.num_classes == 1000 else []
        data_sets += [IMAGENET_22K] if checkpoint.knows_imagenet22k else []
        if checkpoint.top1 is not None:
            results = accuracy_results(
                IMAGENET_1K, 'validation', checkpoint.top1, checkpoint.top5, 'ImageNet-1k',
                ('official model zoo', SOURCE))
    title = checkpoint.tag if checkpoint else model.architecture
    is_student = checkpoint is not None and checkpoint.knows_imagenet22k and checkpoint.tag != TEACHER
    base = checkpoint and checkpoint.base
    metadata = model_metadata(
        title, results, is_student, data_sets, base if not base or '/' in base else f'timm/{base}',
        license=LICENSE if checkpoint else None)
    tuned = next((item for item in OFFICIAL_CHECKPOINTS if checkpoint and item.base == checkpoint.tag), None)
    return ModelCard(render_card(
        'converted_card.md', metadata, title=title, repo=repo, model=model, notes='', source=source, url=SOURCE,
        checkpoint=checkpoint, tuned=tuned, is_student=is_student,
        # Of timm's tags only that of 512 pixels squashes as the official evaluation does, and the teacher has none.
        other_crop=checkpoint is not None and checkpoint.tag != TEACHER and model.size[0] < 512,
        evaluation=evaluation_command(repo, IMAGENET_1K, 'validation'), citation=CITATION,
        speed=SPEED.get(model.architecture) if checkpoint else None,
        published_speed=PUBLISHED_SPEED.get(model.architecture) if checkpoint else None))
