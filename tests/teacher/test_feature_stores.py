"""Stores of features: filled from any backbone, the same whoever fills, with all that stores of classes can do."""

import json
import re
import shutil
import time

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from support.flags import DATA as EXAMPLES
from support import hub_programs
from support.files import tree
from support.programs import refusal
from timm_tinyvit import cli, save_logits
from timm_tinyvit.data.dataset import SparseLogitDataset, collate
from timm_tinyvit.data.opening import open_store
from timm_tinyvit.data.sources import load_split
from timm_tinyvit.models.saving import export_model
from timm_tinyvit.store.local import LogitStore
from timm_tinyvit.store.projection import PROJECTION_NAME
from timm_tinyvit.teacher.teacher import Teacher

DATA = ['--dataset', EXAMPLES, '--train-split', 'train[:100]']
FILL = [*DATA, '--targets', 'features', '--img-size', '32', '--scale', '0.6', '1', '--shard-size',
        '40', '--teacher-batch-size', '16', '--workers', '0', '--quiet']


def fill(path, teacher, *flags):
    save_logits.main([*FILL, '--teacher', teacher, '--logits', str(path), '--epochs', '2', *flags])


@pytest.fixture(scope='module')
def backbone(tmp_path_factory):
    """The folder of a timm model without a classifier, whose map of its 64 pixels has 2x2 cells."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('backbone') / 'teacher'
    export_model(folder, timm.create_model('test_convnext', num_classes=0), data_config={'input_size': (3, 64, 64)})
    return str(folder)


@pytest.fixture(scope='module')
def stores(tmp_path_factory, backbone):
    """Folders of the pooled vector, of a grid, and of a grid that is projected; not to be written to."""
    folder = tmp_path_factory.mktemp('stores')
    for name, flags in (('pooled', []), ('grid', ['--feature-grid', '2', '--codec', 'float16']),
                        ('projected', ['--feature-grid', '2', '--feature-dim', '24'])):
        fill(folder / name, backbone, *flags)
    return folder


def teacher_maps(store_path, backbone):
    """The maps [B, C, h, w] and the pooled vectors [B, C] of the views of epoch 1, by plain timm; and the records."""
    store, replay = open_store(store_path, {}, print)
    data = SparseLogitDataset(load_split(EXAMPLES, 'train[:100]', is_training=True), replay, store)
    batch = collate(data.__getitems__([(1, row) for row in range(100)]))
    model = timm.create_model(f'local-dir:{backbone}', pretrained=True).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ('mean', 'std'))
    views = F.interpolate(batch['view'].float(), (64, 64), mode='bicubic', antialias=True)
    with torch.no_grad():
        maps = model.forward_features((views / 255 - mean) / std)
        pooled = model.forward_head(maps, pre_logits=True)
    return maps, pooled, store.codec.decode(batch['record'], check=True).vectors


def test_the_pooled_vector_is_that_of_timm(stores, backbone):
    maps, pooled, vectors = teacher_maps(stores / 'pooled', backbone)
    assert vectors.shape == (100, 1, pooled.shape[1])
    assert F.cosine_similarity(vectors[:, 0], pooled).min() > 0.9995
    store = LogitStore.open(stores / 'pooled')
    assert store.manifest.features == {'dim': pooled.shape[1], 'grid': 0, 'projection': '', 'variance': 1.0}
    assert (store.manifest.codec, store.manifest.record_width) == ('int8', 2 + pooled.shape[1] + 5)


def test_a_grid_is_the_map_of_timm_cell_by_cell(stores, backbone):
    maps, _, vectors = teacher_maps(stores / 'grid', backbone)
    assert maps.shape[-2:] == (2, 2)
    torch.testing.assert_close(vectors, maps.flatten(2).transpose(1, 2), rtol=2e-3, atol=1e-3)


def test_a_projection_is_orthogonal_fitted_on_the_first_epoch_and_keeps_what_it_says(stores, backbone):
    maps, _, vectors = teacher_maps(stores / 'projected', backbone)
    tensors = load_file(stores / 'projected' / PROJECTION_NAME)
    components = tensors['components']
    torch.testing.assert_close(components @ components.T, torch.eye(24), rtol=0, atol=1e-5)
    cells = maps.flatten(2).transpose(1, 2)
    expected = (cells - tensors['mean']) @ components.T
    assert F.cosine_similarity(vectors, expected, dim=-1).mean() > 0.9995
    manifest = LogitStore.open(stores / 'projected').manifest
    assert manifest.features['dim'] == 24
    # The share is of epoch 0; that of the next differs by its draws.
    centred = cells - cells.flatten(0, 1).mean(dim=0)
    share = ((centred @ components.T).square().sum() / centred.square().sum()).item()
    assert 0.5 < manifest.features['variance'] < 1 and abs(share - manifest.features['variance']) < 0.05


@pytest.mark.parametrize('name, side, grid', [
    ('test_resnet', 5, 5), ('test_mambaout', 5, 3), ('test_vit', 10, 4), ('test_vit4', 10, 10),
    ('test_convnext', 5, 2)])
@pytest.mark.parametrize('num_classes', [0, 10])
def test_every_layout_of_timm_gives_its_map_without_class_tokens(name, side, grid, num_classes):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=num_classes).eval()
    views = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    teacher = Teacher(model, name, torch.device('cpu'), size=(160, 160), grid=grid)
    pooled = Teacher(model, name, torch.device('cpu'), size=(160, 160), grid=0)
    # timm's own way to maps of all layouts.
    with torch.no_grad():
        image = teacher._input(views)
        expected = model.forward_intermediates(image, indices=1, norm=True, output_fmt='NCHW')[1][-1]
    assert expected.shape[-1] == side and teacher.num_classes == 0
    expected = F.adaptive_avg_pool2d(expected, grid).flatten(2).transpose(1, 2)
    if name != 'test_mambaout':  # whose intermediates are before its norm
        torch.testing.assert_close(teacher(views), expected)
    assert teacher(views).shape == expected.shape
    with torch.no_grad():
        torch.testing.assert_close(
            pooled(views)[:, 0], model.forward_head(model.forward_features(image), pre_logits=True))


def test_parts_filled_by_several_are_the_bytes_of_one(stores, backbone, tmp_path):
    for shards in ('2:3', '0:1', '0:3'):
        fill(tmp_path / 'parts', backbone, '--feature-grid', '2', '--feature-dim', '24', '--shards', shards)
    assert tree(tmp_path / 'parts', hidden=False) == tree(stores / 'projected', hidden=False)
    # What is left out comes from the store.
    shutil.rmtree(tmp_path / 'parts' / 'epoch-00001')
    save_logits.main([*DATA, '--teacher', backbone, '--logits', str(tmp_path / 'parts'), '--epochs', '2', '--workers',
                      '0', '--quiet'])
    assert tree(tmp_path / 'parts', hidden=False) == tree(stores / 'projected', hidden=False)


def test_two_that_start_together_and_are_killed_fit_one_projection(stores, backbone, tmp_path, warm_processes):
    path = tmp_path / 'both'
    flags = [*FILL, '--teacher', backbone, '--logits', str(path), '--epochs', '2', '--feature-grid', '2',
             '--feature-dim', '24']

    def start():
        process = warm_processes.Process(target=save_logits.main, args=(flags,))
        process.start()
        return process

    both, deadline = [start(), start()], time.monotonic() + 120
    while not list(path.glob('epoch-*/shard-*.arrow')):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for process in both:
        process.kill()
        process.join()
    last = start()
    last.join()
    assert last.exitcode == 0
    assert tree(path, hidden=False) == tree(stores / 'projected', hidden=False)


def test_everything_that_stores_of_classes_can_do(stores, backbone, tmp_path, capsys):
    store = str(stores / 'projected')
    cli.main(['store', 'verify', store])
    cli.main(['store', 'describe', store])
    shown = capsys.readouterr().out
    assert 'features, 2x2 vectors of 24 numbers' in shown and 'agreement        a cosine of' in shown
    cli.main(['store', 'check', store, *DATA, '--teacher', backbone])
    assert '100 of 100' not in (checked := capsys.readouterr().out) and '200 views: 200' in checked
    cli.main(['store', 'copy', store, '--output', str(tmp_path / 'first'), '--epochs', '1'])
    cli.main(['store', 'copy', store, '--output', str(tmp_path / 'second'), '--epochs', '1:2'])
    cli.main(['store', 'merge', str(tmp_path / 'first'), str(tmp_path / 'second'), '--output', str(tmp_path / 'both')])
    assert tree(tmp_path / 'both', hidden=False) == tree(store, hidden=False)
    cli.main(['store', 'copy', store, *DATA, '--output', str(tmp_path / 'rows'), '--samples', '10:70'])
    part = LogitStore.open(tmp_path / 'rows')
    assert (part.read(1, [0, 59]) == LogitStore.open(store).read(1, [10, 69])).all() and part.open_projection()
    capsys.readouterr()
    cli.main(['report', store, '--json'])
    report = json.loads(capsys.readouterr().out)
    assert report['statistics']['views'] == 200 and 0 < report['statistics']['agreement'] < 1
    cli.main(['report', store, '--html', str(tmp_path / 'page.html')])
    page = (tmp_path / 'page.html').read_text()
    assert 'Feature store projected' in page and 'give --dataset' in page and 'Nearest neighbours' not in page
    cli.main(['store', 'estimate', '--epochs', '2', '--num-samples', '100', '--targets', 'features', '--feature-dim',
              '24', '--feature-grid', '2'])
    assert '109 bytes (2x2 vectors of 24 numbers, int8)' in capsys.readouterr().out
    assert LogitStore.open(store).manifest.record_width == 4 * (24 + 2) + 5


def test_the_page_shows_views_and_those_that_are_nearest_to_them(stores, tmp_path, capsys, one_sentence):
    store, page = stores / 'grid', tmp_path / 'page.html'
    one_sentence(refusal(cli.main, ['report', store, '--gallery', tmp_path / 'rows.png'], capsys), '--gallery',
                 'give --dataset')
    cli.main(['report', str(store), *DATA, '--html', str(page), '--gallery', str(tmp_path / 'rows.png')])
    captions = re.findall('<img[^>]*>([^<]*)<', page.read_text())
    assert len(captions) == 8 * 6 and Image.open(tmp_path / 'rows.png').height > 8 * 144
    reader = LogitStore.open(store)
    vectors = F.normalize(reader.codec.decode(torch.from_numpy(reader.read(0, range(100)))).vectors.mean(dim=1), dim=1)
    samples = load_split(EXAMPLES, 'train[:100]', is_training=True)
    names = [samples.features['label'].names[label] for label in samples['label']]
    # Of each sample what a row that begins with it says: its class, and cosine and class of the five nearest.
    expected = set()
    for sample, name in enumerate(names):
        cosines, near = (vectors @ vectors[sample]).topk(6)
        assert near[0] == sample
        expected.add((name, *(f'{cosine:.3f} {names[other]}' for cosine, other in zip(cosines[1:], near[1:].tolist()))))
    rows = [tuple(captions[start:start + 6]) for start in range(0, 48, 6)]
    assert set(rows) <= expected and len({row[0] for row in rows}) == 8


def test_a_projection_that_is_missing_or_altered_is_told(stores, backbone, tmp_path, capsys, one_sentence):
    path = shutil.copytree(stores / 'projected', tmp_path / 'store')
    file = path / PROJECTION_NAME
    tensors = load_file(file)
    for damage, words in ((lambda: file.unlink(), 'missing'), (lambda: file.write_bytes(b'?'), 'damaged'),
                          (lambda: save_file({**tensors, 'mean': tensors['mean'] + 1}, file), 'another store')):
        damage()
        for main, argv in (
                (save_logits.main, [*FILL, '--teacher', backbone, '--logits', path, '--epochs', '3']),
                (cli.main, ['store', 'check', path, *DATA, '--teacher', backbone]),
                (cli.main, ['store', 'copy', path, '--output', tmp_path / 'copy'])):
            one_sentence(refusal(main, argv, capsys), 'projection', words)
        with pytest.raises(SystemExit):
            cli.main(['store', 'verify', str(path)])
        assert words in capsys.readouterr().out


def broken_teacher(folder):
    torch.manual_seed(0)
    model = timm.create_model('test_vit', num_classes=0)
    model.norm.weight.data[0] = float('nan')
    export_model(folder, model)
    return folder


def test_what_a_filling_refuses(stores, backbone, teacher, tmp_path, capsys, one_sentence):
    classes = tmp_path / 'classes'
    fill_classes = [*DATA, '--teacher', teacher, '--epochs', '1', '--img-size', '32', '--scale', '0.6', '1',
                    '--workers', '0', '--quiet']
    save_logits.main([*fill_classes, '--logits', str(classes), '--topk', '3'])
    fill = [*FILL, '--teacher', backbone]
    new, pooled = tmp_path / 'new', stores / 'pooled'
    for argv, words in (
        ([*fill, '--logits', classes], ['holds classes', '--targets features']),
        ([*fill_classes, '--targets', 'classes', '--logits', pooled], ['holds features', '--targets classes']),
        ([*fill, '--logits', pooled, '--feature-grid', '2'], ['features grid', str(pooled)]),
        ([*fill, '--logits', pooled, '--feature-dim', '8'], ['features dim', str(pooled)]),
        ([*fill, '--logits', new, '--feature-grid', '3'], ['2x2 cells', '3x3', 'teacher']),
        ([*fill, '--logits', new, '--feature-dim', '300'], ['--feature-dim is 300', 'numbers']),
        ([*fill, '--logits', new, '--codec', 'compact'], ["'compact'", 'float16, int8']),
        ([*fill_classes, '--logits', new, '--feature-dim', '8'], ['--targets features']),
        ([*fill_classes, '--logits', new, '--teacher', backbone], ['no classifier', '--targets features']),
        ([*fill, '--logits', new, '--targets', 'words'], ['--targets', 'words']),
        ([*fill, '--logits', tmp_path / 'nan', '--teacher', broken_teacher(tmp_path / 'broken')], ['NaN']),
        ([*fill, '--logits', tmp_path / 'nan2', '--teacher', tmp_path / 'broken', '--feature-dim', '8'], ['NaN']),
    ):
        one_sentence(refusal(save_logits.main, [*argv, '--epochs', '1'], capsys), *words)
    assert not LogitStore.exists(new)


@pytest.mark.parametrize('name, words', [
    ('coat_lite_tiny', 'is no map of cells; choose another model, or leave --feature-grid out'),
    ('crossvit_9_240', "'list' object")])
def test_a_teacher_without_a_map_is_refused_where_a_grid_is_wanted_and_has_its_pooled_vector(name, words, refused):
    """One whose tokens make no rectangle, and one whose features are those of two branches."""
    model = timm.create_model(name, num_classes=0)
    with refused(f'the teacher {name} has no such features', words):
        Teacher(model, name, 'cpu', grid=2)
    assert Teacher(model, name, 'cpu', grid=0).num_features == model.num_features


def test_a_store_of_features_is_published_and_read_from_the_hub(stores, backbone, tmp_path, hub, hub_children):
    store = shutil.copytree(stores / 'projected', tmp_path / 'store')
    ended = hub_children.run(
        hub_programs.publish_features, hub.environment(tmp_path / 'home'), store, EXAMPLES, backbone)
    assert '200 views: 200' in ended.stdout and 'nothing was pushed' in ended.stdout
