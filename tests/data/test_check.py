"""`timm-tinyvit data check`: what it finds in a data set, its exit status, and the images that a store remembers."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from support.programs import refusal

from timm_tinyvit import cli, save_logits
from timm_tinyvit.data.check import check_dataset
from timm_tinyvit.data.sources import load_split
from timm_tinyvit.store.local import LogitStore
from timm_tinyvit.teacher.copy import copy_epochs, copy_keys, copy_range, merge_stores

pytestmark = pytest.mark.usefixtures('own_cache')
SIZE = (24, 16)


def picture(number, mode='RGB', size=SIZE):
    pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def write(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Four images of each of two classes to train with, and one of each to evaluate on, in which nothing is wrong."""
    root = tmp_path / 'photos'
    for number in range(8):
        write(root / 'train' / ('cat', 'dog')[number % 2] / f'{number}.png', picture(number))
    for number in (8, 9):
        write(root / 'val' / ('cat', 'dog')[number % 2] / f'{number}.png', picture(number))
    return root


def check(capsys, *argv):
    """The exit status of `data check`, and what it prints."""
    capsys.readouterr()
    try:
        cli.main(['data', 'check', *map(str, argv), '-j', '0', '--quiet'])
        status = 0
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().out


def no_change(root):
    pass


def cut(root):
    for name, number in (('train', 2), ('val', 8)):
        file = root / name / 'cat' / f'{number}.png'
        file.write_bytes(file.read_bytes()[:300])


def real_numbers(root):
    write(root / 'train/cat/a.tiff', Image.fromarray(np.zeros((4, 4), np.float32)))


def empty(root):
    (root / 'train/dog/1.png').write_bytes(b'')


def see_through(root):
    write(root / 'train/cat/a.png', Image.new('RGBA', SIZE, (9, 8, 7, 0)))
    write(root / 'train/cat/b.png', Image.new('RGBA', SIZE, (9, 8, 7, 255)))
    gradient = Image.linear_gradient('L').resize(SIZE).convert('P')
    write(root / 'train/dog/c.gif', gradient, transparency=gradient.getpixel((0, 0)))


def thin(root):
    write(root / 'train/cat/a.png', picture(20, size=(200, 19)))
    write(root / 'train/cat/b.png', picture(21, size=(7, 7)))
    write(root / 'train/cat/c.png', picture(22, size=(200, 20)))


def in_both(root):
    shutil.copy(root / 'train/cat/4.png', root / 'val/dog/copy.png')


def twice(root):
    shutil.copy(root / 'train/cat/4.png', root / 'train/dog/a.png')
    shutil.copy(root / 'train/cat/4.png', root / 'train/cat/a.png')


def alone(root):
    write(root / 'train/fox/1.png', picture(30))
    write(root / 'val/emu/1.png', picture(31))


def left_out(root):
    (root / 'train/cat/notes.txt').write_text('hello')


def alike(root):
    for number, name in enumerate(('Dog', 'caf\u00e9', '\uff23af\u00e9')):
        write(root / 'train' / name / '1.png', picture(40 + number))
        write(root / 'val' / name / '1.png', picture(50 + number))


def no_validation(root):
    shutil.rmtree(root / 'val')


@pytest.mark.parametrize('change, status, expected', [
    (no_change, 0, []),
    (cut, 2, ['images of train that cannot be read: 1', 'train 1 (train/cat/2.png): ',
              'images of validation that cannot be read: 1', 'validation 0 (val/cat/8.png): ']),
    (real_numbers, 2, ['train 4 (train/cat/a.tiff): its pixels are real numbers']),
    (empty, 2, ['train 4 (train/dog/1.png): it is empty']),
    (see_through, 1, ['images of train with transparent pixels, which get the colour below them: 2',
                      'train 4 (train/cat/a.png)', 'train 10 (train/dog/c.gif)']),
    (thin, 1, ['or more than 10 times as long as the other: 2', 'train 4 (train/cat/a.png): 200x19',
               'train 5 (train/cat/b.png): 7x7']),
    (in_both, 1, ['in train and in validation, byte for byte: 1',
                  'train 2 (train/cat/4.png) = validation 2 (val/dog/copy.png)']),
    (twice, 1, ['train that are there with another label too: 1', 'train 9 (train/dog/a.png) = train 2 ',
                'train that are there before, byte for byte: 2', 'train 4 (train/cat/a.png) = train 2 ']),
    (alone, 1, ['images in train and none in validation: 1', '  fox', 'in validation and none in train: 1', '  emu']),
    (left_out, 1, ['1 files are left out', 'train/cat/notes.txt']),
    (alike, 1, ['names of classes that differ in case, spaces or Unicode form alone: 2', "'Dog' and 'dog'"]),
    (no_validation, 1, ['nothing to evaluate on', 'no split validation']),
], ids=lambda value: getattr(value, '__name__', ''))
def test_what_a_run_would_trip_over_is_found_and_the_status_says_whether_it_would_go_on(
        change, status, expected, photos, capsys):
    change(photos)
    found, said = check(capsys, photos)
    assert found == status
    for words in expected:
        assert words in said
    if not expected:
        assert said.splitlines() == [
            'train            8 images, 2 classes, 24x16 pixels', 'validation       2 images, 2 classes, 24x16 pixels',
            'formats          10 PNG RGB', *[line for line in said.splitlines() if line.startswith('content ')]]


def test_all_images_that_cannot_be_read_are_named_and_of_the_rest_the_first_and_in_json_all(photos, capsys):
    for number in range(30):
        (photos / f'train/cat/broken {number:02}.png').write_bytes(b'nothing')
        write(photos / f'train/dog/same {number:02}.png', picture(0))
    status, said = check(capsys, photos)
    assert status == 2 and sum('broken' in line for line in said.splitlines()) == 30
    assert sum('same' in line for line in said.splitlines()) < 25 and 'more (--json)' in said
    status, said = check(capsys, photos, '--json')
    found = json.loads(said)
    sizes = {item['what'].partition(':')[0]: (len(item['samples']), item['refused']) for item in found['findings']}
    assert status == found['status'] == 2 and sizes == {
        'images of train that cannot be read': (30, True),
        'images of train that are there with another label too': (30, False),
        'images of train that are there before, byte for byte': (30, False)}


def test_loader_workers_find_the_same(photos, tmp_path):
    cut(photos)
    twice(photos)
    alone, shared = (check_dataset(str(photos), num_workers=workers).to_json() for workers in (0, 2))
    assert alone == shared


@pytest.mark.parametrize('label, refused', [(2, True), (-2, True), (-1, False)])
def test_labels_that_are_no_class_are_named(label, refused, fashion, tmp_path):
    rows = fashion.select(range(20)).cast_column('label', datasets.ClassLabel(num_classes=10))
    labels = [7, label + 10 if label > 0 else label, *rows['label'][2:]]
    split = rows.remove_columns('label').add_column('label', labels).with_format(None)
    datasets.DatasetDict(train=split.cast(datasets.Features(
        {**split.features, 'label': datasets.Value('int64')})), validation=rows).save_to_disk(tmp_path / 'data')
    found = check_dataset(str(tmp_path / 'data'))
    texts = [finding.what for finding in found.findings]
    assert any('without a label: 1' in text for text in texts) == (label == -1)
    assert any('none of its classes: 1' in text for text in texts) == (label == -2)


def test_odd_modes_are_told_with_what_becomes_of_them(photos, capsys):
    write(photos / 'train/cat/a.png', Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20)))
    write(photos / 'train/cat/b.jpg', picture(1, 'CMYK'))
    write(photos / 'train/cat/c.gif', picture(2, 'P'), save_all=True, append_images=[picture(3, 'P')])
    exif = Image.Exif()
    exif[0x0112] = 6
    write(photos / 'train/cat/d.jpg', picture(4), exif=exif)
    status, said = check(capsys, photos)
    assert status == 0
    for words in ('10 PNG RGB, 1 PNG I;16, 1 JPEG CMYK, 1 GIF P, 1 JPEG RGB',
                  '1 of more than 8 bits a channel, of which the highest 8 are kept, as train 4 (train/cat/a.png)',
                  '1 turned upright by their EXIF tag, as train 7 (train/cat/d.jpg)',
                  '1 of several frames or pages, of which the first is read, as train 6 (train/cat/c.gif)'):
        assert words in said


def test_the_hash_of_the_content_knows_every_byte_and_the_order_and_with_keys_no_order(photos, tmp_path, capsys):

    def content(*argv):
        return json.loads(check(capsys, *argv, '--json')[1])['content']

    before = content(photos)
    assert content(photos) == before and set(before) == {'train', 'validation'}
    write(photos / 'train/cat/2.png', picture(99))
    changed = content(photos)
    assert changed['train'] != before['train'] and changed['validation'] == before['validation']
    rows = datasets.Dataset.from_dict({
        'image': [{'bytes': (photos / f'train/{name}').read_bytes(), 'path': None}
                  for name in ('cat/0.png', 'cat/2.png', 'cat/4.png', 'cat/6.png')], 'label': [0] * 4,
        'name': list('abcd')}).cast_column('image', datasets.Image())
    places = [tmp_path / name for name in ('forth', 'back', 'twice')]
    for place, order in zip(places, ([0, 1, 2, 3], [3, 1, 0, 2], [0, 1, 2, 2])):
        datasets.DatasetDict(train=rows.select(order)).save_to_disk(place)
    forth, back = (content(place)['train'] for place in places[:2])
    keyed = [content(place, '--key', 'name')['train'] for place in places[:2]]
    assert forth != back and keyed[0] == keyed[1]
    status, said = check(capsys, places[2], '--key', 'name')
    assert status == 2 and 'samples that have the key of another one: 1' in said


def test_what_cannot_be_loaded_is_one_sentence(photos, tmp_path, capsys, one_sentence):
    for argv, words in [
        ([tmp_path / 'nothing'], ['there is no folder']), ([photos, '--val-split', 'dev'], ['no split dev']),
        ([photos, '--input-key', 'label'], ['not images']), ([photos, '--logits', tmp_path], ['no logit store']),
        ([photos, '--key', 'name'], ["no column 'name'"]),
    ]:
        one_sentence(refusal(cli.main, ['data', 'check', *argv, '-j', '0'], capsys), *words)


# What a store remembers


def fill(teacher, dataset, path, epochs=1, *argv):
    save_logits.main([
        '--dataset', str(dataset), '--teacher', teacher, '--logits', str(path), '--epochs', str(epochs), '--img-size',
        '32', '--shard-size', '3', '--workers', '0', '--quiet', *argv])
    return LogitStore.open(path)


def test_filling_remembers_every_image_and_refuses_another_one_in_a_later_epoch(
        photos, teacher, tmp_path, capsys, monkeypatch, one_sentence):
    monkeypatch.setattr('timm_tinyvit.data.fingerprint.NUM_FINGERPRINT_ROWS', 2)  # rows 0 and 4
    store = fill(teacher, photos, tmp_path / 'store')
    digests = [store.read_digests(shard) for shard in range(3)]
    assert [len(part) for part in digests] == [3, 3, 2] and len(set(np.concatenate(digests).tolist())) == 8
    before = {file.name: file.read_bytes() for file in (store.path / 'images').iterdir()}
    assert check(capsys, photos, '--logits', store.path)[0] == 0
    good = (photos / 'train/cat/6.png').read_bytes()
    write(photos / 'train/cat/6.png', picture(77))
    argv = ['--dataset', photos, '--teacher', teacher, '--logits', store.path, '--epochs', '2', '--workers', '0']
    one_sentence(refusal(save_logits.main, argv, capsys), 'sample 3', 'timm-tinyvit data check')
    assert store.missing([1]) == [(1, 1), (1, 2)]
    status, said = check(capsys, photos, '--logits', store.path)
    assert status == 2 and 'train 3 (train/cat/6.png)' in said and 'filled from: 1' in ' '.join(said.split())
    (photos / 'train/cat/6.png').write_bytes(good)
    fill(teacher, photos, store.path, 2)
    assert before == {file.name: file.read_bytes() for file in (store.path / 'images').iterdir()}
    assert check(capsys, photos, '--logits', store.path)[0] == 0


def test_a_store_that_remembers_nothing_does_from_the_first_check_on_where_the_data_are_its_own(
        photos, teacher, tmp_path, capsys):
    store = fill(teacher, photos, tmp_path / 'store')
    before = {file.name: file.read_bytes() for file in (store.path / 'images').iterdir()}
    shutil.rmtree(store.path / 'images')
    changed = shutil.copytree(photos, tmp_path / 'changed')
    write(changed / 'train/cat/0.png', picture(78))
    status, said = check(capsys, changed, '--logits', store.path)
    assert status == 2 and 'this is not the data set' in said and not (store.path / 'images').exists()
    status, said = check(capsys, photos, '--logits', store.path)
    assert status == 0 and '0 of 8 images compared, 8 remembered from now on' in said
    assert before == {file.name: file.read_bytes() for file in (store.path / 'images').iterdir()}
    assert '8 of 8 images compared' in check(capsys, photos, '--logits', store.path)[1]


@pytest.mark.parametrize('damage', ['cut', 'flip', 'another store', 'link'])
def test_digests_that_are_damaged_of_another_store_or_elsewhere_are_refused(
        damage, photos, teacher, tmp_path, capsys):
    store = fill(teacher, photos, tmp_path / 'store')
    file = store.path / 'images' / 'shard-00001.digests'
    if damage == 'cut':
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == 'flip':
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    elif damage == 'another store':
        shutil.copy(fill(teacher, photos, tmp_path / 'other', 1, '--store-seed', '5').path / 'images' / file.name, file)
    else:
        shutil.rmtree(store.path / 'images')
        (tmp_path / 'elsewhere').mkdir()
        (store.path / 'images').symlink_to(tmp_path / 'elsewhere')
    if damage == 'link':
        assert 'is a link' in refusal(cli.main, ['data', 'check', photos, '--logits', store.path, '-j', '0'], capsys)
        assert not list((tmp_path / 'elsewhere').iterdir())
    else:
        status, said = check(capsys, photos, '--logits', store.path)
        assert status == 2 and f'{file} is damaged or of another store' in said
        assert any(str(file) in problem for problem in store.verify(range(1)))


def test_with_keys_images_are_compared_whatever_their_order_and_whatever_is_left_out(keyed_store, tmp_path, capsys):
    data, path = keyed_store
    path = shutil.copytree(path, tmp_path / 'store')
    rows = datasets.load_from_disk(str(data))
    part = datasets.DatasetDict(train=rows.select([7, 30, 2, 11, 39]))
    part.save_to_disk(tmp_path / 'part')
    status, said = check(capsys, tmp_path / 'part', '--logits', path)
    assert status == 1 and '5 of 5 images compared' in said  # there is nothing to evaluate on

    def swap(row):
        return {**row, 'image': Image.new('L', (28, 28), 5)} if row['name'] == 'image 30' else row

    part.map(swap).save_to_disk(tmp_path / 'changed')
    status, said = check(capsys, tmp_path / 'changed', '--logits', path)
    assert status == 2 and 'filled from: 1' in ' '.join(said.split()) and 'train 1' in said


def test_copies_and_merged_stores_remember_what_those_did_that_they_are_made_of(keyed_store, photos, teacher, tmp_path):
    plain = fill(teacher, photos, tmp_path / 'plain', 2)
    known = np.concatenate([plain.read_digests(shard) for shard in range(3)])
    whole = copy_epochs(plain, tmp_path / 'whole', range(1, 2))
    part = copy_range(plain, tmp_path / 'part', range(2, 7), load_split(str(photos), None, True))
    merged = merge_stores(tmp_path / 'merged', [plain, whole])
    for store, rows in ((whole, slice(None)), (part, slice(2, 7)), (merged, slice(None))):
        found = [store.read_digests(shard) for shard in range(store.manifest.num_shards)]
        assert np.array_equal(np.concatenate(found), known[rows])
    data, keyed = keyed_store
    keyed = LogitStore.open(keyed)
    known = np.concatenate([keyed.read_digests(shard) for shard in range(4)])
    rows = datasets.load_from_disk(str(data))
    first, second = (copy_keys(keyed, tmp_path / f'keys {start}', rows.select(range(start, start + 20)))
                     for start in (20, 0))
    both = merge_stores(tmp_path / 'both', [first, second])
    found = np.concatenate([both.read_digests(shard) for shard in range(4)])
    assert np.array_equal(found, np.roll(known, -20))
    # Of what is not known nothing is made up.
    shutil.rmtree(second.path / 'images')
    assert merge_stores(tmp_path / 'again', [first, second]).read_digests(0) is None


def test_a_stream_is_remembered_as_it_is_filled(keyed_store, teacher, tmp_path, fashion):
    (tmp_path / 'data').mkdir()
    rows = fashion.select(range(40)).add_column('name', [f'image {row}' for row in range(40)])
    rows.to_parquet(str(tmp_path / 'data' / 'train.parquet'))
    store = fill(
        teacher, tmp_path / 'data', tmp_path / 'store', 1, '--key', 'name', '--streaming', '--shard-size', '10')
    _, path = keyed_store
    other = LogitStore.open(path)
    for shard in range(4):
        assert np.array_equal(store.read_digests(shard), other.read_digests(shard))


def test_mixed_views_are_remembered_by_their_own_images(photos, teacher, tmp_path):
    plain, mixed = (fill(teacher, photos, tmp_path / name, 1, *argv)
                    for name, argv in (('plain', []), ('mixed', ['--mixup', '0.8'])))
    for shard in range(3):
        assert np.array_equal(plain.read_digests(shard), mixed.read_digests(shard))
