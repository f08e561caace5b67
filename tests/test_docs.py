"""The code on every page of the documentation, run as it stands there; what takes a cluster is made small."""

import io

import datasets
import pytest
import timm
import torch
from PIL import Image

from support.files import encode_image
from support.flags import ROOT
import timm_tinyvit  # noqa: F401  registers the models
from timm_tinyvit.models.saving import export_model

# Of torch, where a page has AOTInductor or FSDP.
NEEDS = {'docs/deployment.md': '2.9', 'docs/cluster.md': '2.11'}
PAGES = ['README.md', *sorted(str(page.relative_to(ROOT)) for page in ROOT.glob('docs/*.md'))]


def parquet(columns, features):
    file = io.BytesIO()
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(file)
    return file.getvalue()


def model_files(folder, name, **kwargs):
    torch.manual_seed(0)
    export_model(folder, timm.create_model(name, **kwargs))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope='module')
def published(tmp_path_factory, fashion):
    """What the pages take from the Hub, by repo and kind: a few images under the names of large data sets, models."""
    images = [encode_image(Image.open(io.BytesIO(row['bytes'])).convert('RGB').resize((48, 40)))
              for row in fashion.cast_column('image', datasets.Image(decode=False))['image'][:32]]
    images = [{'bytes': image, 'path': None} for image in images]
    classes = datasets.ClassLabel(names=[f'class {number}' for number in range(1000)])
    folder = tmp_path_factory.mktemp
    return {
        ('ILSVRC/imagenet-1k', 'dataset'): {
            f'data/{split}-00000-of-00001.parquet': parquet(
                {'image': images[start:], 'label': list(range(len(images) - start))},
                {'image': datasets.Image(), 'label': classes})
            for split, start in (('train', 0), ('validation', 24))},
        ('timm/imagenet-22k-wds', 'dataset'): {
            'data/train-00000-of-00001.parquet': parquet(
                {'jpg': images, 'cls': list(range(0, 21841, 700))},
                {'jpg': datasets.Image(), 'cls': datasets.Value('int64')})},
        ('tests/teacher-1k', 'model'): model_files(folder('teacher'), 'test_resnet', num_classes=1000),
        ('tests/teacher-22k', 'model'): model_files(folder('teacher'), 'test_resnet', num_classes=21841),
        ('timm/tiny_vit_21m_224.dist_in22k_ft_in1k', 'model'): model_files(folder('tiny'), 'tiny_vit_21m_224'),
    }


@pytest.mark.parametrize('page', PAGES)
def test_the_code_of_a_page_runs(page, published, fashion, hub, hub_children, s3_server, tmp_path):
    if torch.__version__ < NEEDS.get(page, ''):
        pytest.skip(f'{page} has commands that need torch {NEEDS[page]}')
    for (repo, kind), files in published.items():
        hub.add_commit(repo, files, repo_type=kind)
    for name in ('examples', 'hub'):
        (tmp_path / name).symlink_to(ROOT / name)
    for number, row in enumerate(fashion.select(range(200))):
        split, name = 'train' if number < 150 else 'validation', fashion.features['label'].int2str(row['label'])
        folder = tmp_path / 'photos' / split / f'{row["label"]} {name}'.replace('/', ' or ')
        folder.mkdir(parents=True, exist_ok=True)
        row['image'].save(folder / f'{number}.jpg')
    row['image'].save(tmp_path / 'image.jpg')
    environment = hub.environment(tmp_path / 'home') | s3_server.environment | {'PYTHONPATH': str(ROOT)}
    if 'runs/demo/logits' in (ROOT / page).read_text(encoding='utf-8'):
        hub_children.run([
            '-m', 'timm_tinyvit.save_logits', '--dataset', 'examples/fashion_mnist', '--train-split', 'train[:500]',
            '--teacher', 'examples/fashion_mnist/teacher', '--logits', 'runs/demo/logits', '--topk', '3', '--epochs',
            '2', '--img-size', '32', '--workers', '0'], environment, folder=tmp_path)
    hub_children.run(
        [str(ROOT / 'tests' / 'support' / 'docs_program.py'), str(ROOT / page)], environment, folder=tmp_path,
        timeout=300)
