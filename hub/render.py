"""Render the cards in this folder: those of the official checkpoints, and of the demo's own model.

    python hub/render.py [--output FOLDER]

`cards/TAG.md` is the card that `timm-tinyvit convert` leaves beside an official checkpoint's weights;
ORG/NAME in it stands for the repo, whose name `publish` puts in. `demo/README.md` is the card of the student that
`make demo` distils, from files of that run in the same folder.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import timm

from timm_tinyvit.hub.convert import TEACHER, TEACHER_IN_TIMM, official_config
from timm_tinyvit.hub.model_card import CARD, NO_REPO, recipe_yaml, run_card
from timm_tinyvit.hub.official import OFFICIAL_CHECKPOINTS, OfficialCheckpoint, converted_card
from timm_tinyvit.models.imagenet22k import NUM_CLASSES_22K
from timm_tinyvit.models.saving import export_config
from timm_tinyvit.train.record import read_run

HUB = Path(__file__).parent
DEMO = 'ORG/tiny_vit_5m_fashion_mnist'


def official_card(checkpoint: OfficialCheckpoint) -> bytes:
    """The card of an official checkpoint, made without its weights."""
    num_classes = 1000 if checkpoint.tag.endswith('in1k') else NUM_CLASSES_22K
    name = TEACHER_IN_TIMM if checkpoint.name == TEACHER else checkpoint.name
    model = timm.create_model(name, num_classes=num_classes, device='meta')
    with TemporaryDirectory() as folder:
        export_config(Path(folder), model, **official_config(checkpoint.name, num_classes))
        return str(converted_card(Path(folder), checkpoint.file, checkpoint, NO_REPO)).encode()


def demo_recipe() -> bytes:
    """The flags of the demo's run, which its card links."""
    return recipe_yaml(read_run(HUB / 'demo')).encode()


def demo_card() -> bytes:
    """The card of the demo's student after its last epoch."""
    notes = (HUB / 'demo' / 'notes.md').read_text(encoding='utf-8')
    speed = json.loads((HUB / 'demo' / 'speed.json').read_text(encoding='utf-8'))
    return str(run_card(HUB / 'demo', 'last', DEMO, 'apache-2.0', notes, speed)).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--output', type=Path, default=HUB, help='where to write the cards')
    args = parser.parse_args()
    cards = {f'cards/{checkpoint.tag}.md': official_card(checkpoint) for checkpoint in OFFICIAL_CHECKPOINTS}
    for name, card in {**cards, f'demo/{CARD}': demo_card(), 'demo/recipe.yaml': demo_recipe()}.items():
        (args.output / name).parent.mkdir(parents=True, exist_ok=True)
        (args.output / name).write_bytes(card)


if __name__ == '__main__':
    main()
