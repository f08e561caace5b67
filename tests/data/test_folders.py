"""Folders and files of data: which split and class each image is of, and what is refused, left out and told."""

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import sys
import tarfile
import zipfile
from contextlib import nullcontext
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets

from support.files import encode_image
from timm_tinyvit.base.errors import InputError
from timm_tinyvit.data.classes import match_names
from timm_tinyvit.data.dataset import ImageDataset
from timm_tinyvit.data.fingerprint import dataset_fingerprint, keyed_fingerprint
from timm_tinyvit.data.sources import class_names, load_split

pytestmark = pytest.mark.usefixtures('own_cache')


def picture(number=0, kind='PNG'):
    return encode_image(Image.new('RGB', (8, 8), (number * 7 % 256, 90, 30)), kind)


def write(root, *paths, data=None):
    for number, path in enumerate(paths):
        file = Path(root, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(number) if data is None else data)


def paths_of(rows, root):
    """The images of a split by their paths from the folder."""
    return [os.path.relpath(source['path'], Path(root).resolve())
            for source in rows.with_format('arrow')[:]['image'].to_pylist()]


def decoded(rows):
    return ImageDataset(rows, lambda image: image.getpixel((0, 0))[0]).__getitems__(list(range(len(rows))))


# Splits


@pytest.mark.parametrize('classes', [
    ['bus', 'car', 'train'], ['test tube', 'beaker'], ['dev', 'ops'], ['eval board', 'valid id', 'train-7'],
    ['Train', 'training shoe'], ['val', 'test', 'train']])
@pytest.mark.parametrize('names', [
    ('train', 'val', 'test'), ('Train', 'VALID', 'Testing'), ('train2017', 'val-2017', 'test_1')])
def test_the_first_level_is_the_split_whatever_classes_are_called(classes, names, tmp_path):
    for name in names:
        write(tmp_path, *(f'{name}/{label}/{number}.png' for label in classes for number in range(2)))
    for name, split in zip(names, ('train', 'validation', 'test')):
        rows = load_split(str(tmp_path), split, is_training=True)
        assert {path.split('/')[0] for path in paths_of(rows, tmp_path)} == {name} and len(rows) == 2 * len(classes)
        assert set(class_names(rows, 'label')) == set(classes)
        assert [class_names(rows, 'label')[label] for label in rows['label']] == [
            path.split('/')[1] for path in paths_of(rows, tmp_path)]


@pytest.mark.parametrize('folders', [
    ['bus', 'car', 'train'], ['bus', 'freight train'], ['train', 'val', 'masks'], ['train_val', 'test'],
    ['freight train', 'test tube'], ['train val']])
def test_a_folder_that_may_be_of_splits_or_of_classes_is_refused(folders, tmp_path, refused):
    write(tmp_path, *(f'{folder}/{number}.png' for folder in folders for number in range(2)))
    with refused(str(tmp_path), *folders, 'splits or classes', 'train/CLASS/'):
        load_split(str(tmp_path), None, is_training=True)


@pytest.mark.parametrize('start', ['', 'images/', 'a/b/'])
@pytest.mark.parametrize('names', [('training_set', 'test_set'), ('imagenet-train', 'imagenet-test')])
def test_longer_names_are_splits_where_they_hold_folders_of_classes(names, start, tmp_path):
    for name in names:
        write(tmp_path, f'{start}{name}/ant/1.png', f'{start}{name}/bee/2.png')
    assert [paths_of(load_split(str(tmp_path), split, True), tmp_path) for split in ('train', 'test')] == [
        [f'{start}{name}/ant/1.png', f'{start}{name}/bee/2.png'] for name in names]


def test_a_folder_of_classes_is_one_split_and_one_of_images_has_no_labels(tmp_path, capsys):
    write(tmp_path / 'classes', 'ant/1.png', 'bee/2.png')
    write(tmp_path / 'flat', 'train/1.png', 'train/2.png', 'val/3.png')
    write(tmp_path / 'one', 'ant/1.png', 'ant/2.png')
    assert load_split(str(tmp_path / 'classes'), None, True)['label'][:] == [0, 1]
    flat, one = load_split(str(tmp_path / 'flat'), None, True), load_split(str(tmp_path / 'one'), None, True)
    assert flat.column_names == one.column_names == ['image'] and len(flat) == len(one) == 2
    assert not capsys.readouterr().err


def test_a_file_whose_name_says_two_splits_is_refused_and_one_in_none_is_told(tmp_path, refused, capsys):
    rows = datasets.Dataset.from_dict({'image': [dict(bytes=picture(), path=None)]})
    (tmp_path / 'two').mkdir()
    rows.to_parquet(tmp_path / 'two' / 'train-dev.parquet')
    with refused('train-dev.parquet', 'several splits'):
        load_split(str(tmp_path / 'two'), None, True)
    # Where `datasets` reads a folder of images, the words in the names of classes.
    write(tmp_path / 'images', 'train/test tube/1.png', 'train/beaker/1.png', 'test/test tube/2.png')
    (tmp_path / 'images' / 'train' / 'metadata.csv').write_text('file_name\nbeaker/1.png\n')
    with refused('train/test tube/1.png', 'several splits'):
        load_split(str(tmp_path / 'images'), None, True)
    (tmp_path / 'none').mkdir()
    for name in ('train', 'freight', 'bus'):
        rows.to_parquet(tmp_path / 'none' / f'{name}.parquet')
    assert len(load_split(str(tmp_path / 'none'), None, True)) == 1
    assert '2 of 3 files are in no split and left out, as bus.parquet' in capsys.readouterr().err


# Classes


@pytest.mark.parametrize('names', [
    [f'{number} {name}' for number, name in enumerate('ant bee cat dog eel fox gnu hen ibis jay koi lynx'.split())],
    ['Zebra', 'ant', 'Bee', 'bee2', 'bee10'], ['n01440764', 'n01443537', 'n02'], ['10', '9', '08', '1.5', '-1']])
def test_classes_have_the_numbers_that_timm_gives_them(names, tmp_path):
    write(tmp_path, *(f'train/{name}/{number}.png' for name in names for number in (2, 10)))
    expected = find_images_and_targets(str(tmp_path / 'train'))[1]
    rows = load_split(str(tmp_path), None, True)
    assert class_names(rows, 'label') == sorted(names, key=expected.get)
    assert [expected[path.split('/')[1]] for path in paths_of(rows, tmp_path)] == rows['label'][:]


def test_names_that_differ_in_case_alone_have_one_order(tmp_path):
    write(tmp_path, *(f'{name}/1.png' for name in ('bee', 'Bee', 'BEE', 'ant')))
    assert class_names(load_split(str(tmp_path), None, True), 'label') == ['ant', 'BEE', 'Bee', 'bee']


@pytest.mark.parametrize('names, expected', [
    (('1', '\u0661', '2', '\u00b2'), ['1', '\u0661', '2', '\u00b2']),
    (('x\u00b2', 'x10', 'x9'), ['x9', 'x10', 'x\u00b2']),
    (('7', '007', '10', '08'), ['007', '7', '08', '10'])])
def test_digits_of_other_scripts_and_zeros_before_them_have_an_order(names, expected, tmp_path):
    write(tmp_path, *(f'train/{name}/1.png' for name in names))
    assert class_names(load_split(str(tmp_path), None, True), 'label') == expected


@pytest.mark.parametrize('split', ['train', 'val'])
def test_a_name_whose_accents_are_put_together_otherwise_is_the_same_class(split, tmp_path, capsys):
    together, apart = 'caf\u00e9', 'cafe\u0301'
    write(tmp_path, f'train/{together}/1.png', 'train/dog/1.png', f'{split}/{apart}/2.png', 'val/dog/2.png')
    train, val = (load_split(str(tmp_path), None, is_training) for is_training in (True, False))
    assert class_names(train, 'label') == class_names(val, 'label') == [together, 'dog']
    assert (train if split == 'train' else val)['label'][:] == ([0, 0, 1] if split == 'train' else [0, 1])
    assert len(decoded(train)) == len(train) and not capsys.readouterr().err
    assert match_names([apart, 'dog'], ['dog', together]).tolist() == [1, 0]


def test_a_name_that_is_not_in_utf_8_is_told(tmp_path, refused):
    write(tmp_path, 'train/ant/1.png', 'train/bee/1.png')
    with open(os.fsencode(tmp_path) + b'/train/bee/caf\xe9.png', 'wb') as file:
        file.write(picture())
    with refused('UTF-8', r'caf\udce9', 'rename'):
        load_split(str(tmp_path), None, True)


def test_splits_of_a_folder_share_their_classes(tmp_path, capsys):
    write(tmp_path, *(f'train/{name}/1.png' for name in ('ant', 'bee', 'cat')), 'val/bee/1.png', 'val/dog/1.png')
    assert class_names(load_split(str(tmp_path), None, True), 'label') == ['ant', 'bee', 'cat', 'dog']
    assert '1 classes without an image to train with, as dog' in capsys.readouterr().err
    assert load_split(str(tmp_path), None, False)['label'][:] == [1, 3]


@pytest.mark.parametrize('odd, words', [
    ('train/ant/more/9.png', ('train/ant/more/9.png lies at another depth than train/ant/0.png',)),
    ('train/9.png', ('train/9.png lies at another depth',))])
def test_the_picture_whose_depth_leaves_a_split_without_labels_is_named(odd, words, tmp_path, capsys):
    write(tmp_path, 'train/ant/0.png', 'train/bee/0.png', odd, 'val/ant/1.png', 'val/bee/1.png')
    assert load_split(str(tmp_path), None, True).column_names == ['image']
    said = capsys.readouterr().err
    assert 'no labels in split train' in said and 'train/CLASS/' in said and all(word in said for word in words)
    assert load_split(str(tmp_path), None, False)['label'][:] == [0, 1] and not capsys.readouterr().err


@pytest.mark.parametrize('paths', [
    ('ant/train/1.png', 'ant/val/2.png', 'bee/train/3.png'), ('indoor/chair/1.png', 'outdoor/chair/2.png')])
def test_folders_of_one_name_at_several_places_are_no_classes(paths, tmp_path, capsys):
    write(tmp_path, *paths)
    assert load_split(str(tmp_path), None, True).column_names == ['image']
    assert 'have the same name' in capsys.readouterr().err


def test_deeper_folders_give_the_class_by_the_last_as_for_timm(tmp_path):
    write(tmp_path, *(f'train/{path}/1.png' for path in ('pets/cat', 'pets/dog', 'wild/fox')))
    rows = load_split(str(tmp_path), None, True)
    assert class_names(rows, 'label') == ['cat', 'dog', 'fox']
    assert list(find_images_and_targets(str(tmp_path / 'train'))[1]) == ['cat', 'dog', 'fox']


# Files


def test_links_are_followed_and_circles_of_them_are_not(tmp_path):
    write(tmp_path / 'pool', 'cat/1.png', 'cat/2.png', 'x.png')
    write(tmp_path / 'set', 'train/ant/1.png', 'train/bee/1.png')
    (tmp_path / 'set' / 'train' / 'cat').symlink_to(tmp_path / 'pool' / 'cat')
    (tmp_path / 'set' / 'train' / 'ant' / 'linked.png').symlink_to(tmp_path / 'pool' / 'x.png')
    (tmp_path / 'set' / 'train' / 'ant' / 'around').symlink_to(tmp_path / 'set')
    (tmp_path / 'again').symlink_to(tmp_path / 'set')
    for root in ('set', 'again'):
        rows = load_split(str(tmp_path / root), None, True)
        assert class_names(rows, 'label') == ['ant', 'bee', 'cat'] and rows['label'][:] == [0, 0, 1, 2, 2]
        assert len(decoded(rows)) == 5


def test_a_link_to_itself_or_to_nothing_is_left_out_and_counted(tmp_path, capsys):
    write(tmp_path, 'train/ant/1.png', 'train/bee/1.png')
    for name, target in (('self', 'self'), ('a.png', 'b.png'), ('b.png', 'a.png'), ('gone', 'nowhere')):
        (tmp_path / 'train' / 'ant' / name).symlink_to(target)
    assert load_split(str(tmp_path), None, True)['label'][:] == [0, 1]
    assert '4 files are left out' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['a.heic', 'train.tgz', 'train.7z', 'train.tfrecord', 'data.mdb', 'x.npz'])
def test_a_folder_of_what_is_not_read_is_refused_with_its_endings(name, tmp_path, refused):
    write(tmp_path, name, f'more/{name}', data=b'x')
    with refused('neither images nor files', f'2 of {Path(name).suffix}'):
        load_split(str(tmp_path), None, True)


@pytest.mark.parametrize('name', ['train-clean', 'my split', 'train'])
def test_a_split_of_any_name_is_found_by_it(name, tmp_path):
    rows = datasets.Dataset.from_dict({'image': [{'bytes': picture(5), 'path': None}] * 2, 'label': [1, 2]})
    datasets.DatasetDict({name: rows, 'val': rows.select([0])}).save_to_disk(tmp_path / 'saved')
    found = load_split(str(tmp_path / 'saved'), name, True)
    assert found['label'][:] == [1, 2] and str(found.split) == name.replace('-', '_').replace(' ', '_')
    assert len(load_split(str(tmp_path / 'saved'), name, True, streaming=True).take(9).to_list()) == 2


@pytest.mark.parametrize('kind', ['parquet', 'arrow', 'tar'])
def test_linked_folders_of_files_are_read(kind, tmp_path):
    write_files(kind, tmp_path / 'pool', 'part2')
    write_files(kind, tmp_path / 'set' / 'train', 'part1')
    (tmp_path / 'set' / 'train' / 'more').symlink_to(tmp_path / 'pool')
    assert len(load_split(str(tmp_path / 'set'), None, True)) == 12


def write_files(kind, folder, name, count=6):
    folder.mkdir(parents=True, exist_ok=True)
    if kind == 'tar':
        write_tar(folder / f'{name}.tar', [item for number in range(count) for item in sample(number)])
        return
    rows = datasets.Dataset.from_dict({'image': [dict(bytes=picture(number), path=None) for number in range(count)],
                                       'label': list(range(count))})
    rows = rows.cast_column('image', datasets.Image())
    if kind == 'parquet':
        rows.to_parquet(folder / f'{name}.parquet')
    else:
        with pa.OSFile(str(folder / f'{name}.arrow'), 'wb') as file, pa.ipc.new_stream(file, rows.data.schema) as out:
            for batch in rows.data.to_batches(2):
                out.write(batch)


def write_tar(path, members, mode='w'):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as file:
        for name, data in members:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            file.addfile(about, io.BytesIO(data))


def sample(number, kind='jpg', key='{:03d}', label=True):
    name = key.format(number)
    image = f'{name}.{kind}', picture(number, 'PNG' if kind.lower().endswith('png') else 'JPEG')
    return [image, (f'{name}.cls', str(number % 3).encode())][:1 + label]


@pytest.mark.parametrize('ending', ['.avif', '.JPG', '.jfif', '.TIFF', '.jp2', '.pgm', ''])
def test_every_ending_that_pillow_reads_is_found_and_files_without_one_by_their_bytes(ending, tmp_path, capsys):
    write(tmp_path, 'train/ant/1.png', 'train/bee/2.png')
    kind = {'.avif': 'AVIF', '.TIFF': 'TIFF', '.jp2': 'JPEG2000', '.pgm': 'PPM'}.get(ending, 'JPEG')
    write(tmp_path, f'train/ant/photo{ending}', f'train/bee/photo{ending}', data=picture(3, kind))
    rows = load_split(str(tmp_path), None, True)
    assert len(decoded(rows)) == 4 and not capsys.readouterr().err


def test_files_that_are_left_out_are_counted(tmp_path, capsys):
    write(tmp_path, *(f'{split}/{name}/1.png' for split in ('train', 'val') for name in ('ant', 'bee')))
    write(tmp_path, *(f'train/{name}' for name in ('ant/2.heic', 'ant/2.txt', 'bee/3.HEIC', 'bee/notes', 'ant/4.eps')),
          data=b'x')
    write(tmp_path, 'logo.png', '.hidden.png', '__MACOSX/train/ant/._1.png')
    (tmp_path / 'val' / 'ant' / 'gone.png').symlink_to(tmp_path / 'nowhere.png')
    os.mkfifo(tmp_path / 'val' / 'bee' / 'pipe.png')
    assert len(load_split(str(tmp_path), None, True)) == 2
    said = capsys.readouterr().err
    assert '6 files are left out' in said and '2 of .heic' in said and '1 of no ending' in said and 'logo.png' in said
    assert len(load_split(str(tmp_path), None, False)) == 2
    assert '2 files are left out' in (said := capsys.readouterr().err) and 'val/ant/gone.png' in said


@pytest.mark.parametrize('name', ['set [v2]', 'a*b', 'what?', 'set [!x]', '#1 100% {a}', "it's ~ \"so\""])
@pytest.mark.parametrize('kind', ['images', 'parquet', 'tar', 'metadata'])
def test_a_path_is_no_pattern(name, kind, tmp_path):
    root = tmp_path / name
    if kind in ('images', 'metadata'):
        write(root, *(f'{split}/{label}/1.png' for split in ('train', 'val') for label in ('ant', 'bee [x]')))
    else:
        for split in ('train', 'val'):
            write_files(kind, root, split)
    if kind == 'metadata':
        for split in ('train', 'val'):
            (root / split / 'metadata.csv').write_text('file_name,label\nant/1.png,0\nbee [x]/1.png,1\n')
    for is_training in (True, False):
        rows = load_split(str(root), None, is_training)
        assert len(decoded(rows)) == (6 if kind in ('parquet', 'tar') else 2)
        dataset_fingerprint(rows)


def test_a_path_with_two_colons_is_read_as_images_and_refused_for_files(tmp_path, refused):
    write(tmp_path / 'a::b', 'train/ant/1.png', 'train/bee/1.png')
    rows = load_split(str(tmp_path / 'a::b'), None, True)
    assert len(decoded(rows)) == 2 and dataset_fingerprint(rows)['num_samples'] == 2
    write_files('parquet', tmp_path / 'c::d', 'train')
    with refused('c::d', '"::"', 'rename'):
        load_split(str(tmp_path / 'c::d'), None, True)


# Files cut short


@pytest.mark.parametrize('streaming', [False, True])
@pytest.mark.parametrize('cut', ['at a header', 'in a header', 'in an image', 'before the second block of the end'])
def test_a_tar_that_is_cut_short_is_refused(cut, streaming, tmp_path, refused):
    write_files('tar', tmp_path, 'train')
    file = tmp_path / 'train.tar'
    with tarfile.open(file) as opened:
        members = opened.getmembers()
    end = members[-1].offset_data + 512
    size = {'at a header': members[8].offset, 'in a header': members[8].offset + 200,
            'in an image': members[8].offset_data + 100, 'before the second block of the end': end + 512}[cut]
    file.write_bytes(file.read_bytes()[:size])
    with refused('train.tar', 'cut short', 'copy'):
        load_split(str(tmp_path), None, True, streaming)


@pytest.mark.parametrize('mode', ['w:gz', 'w:bz2', 'w:xz'])
def test_a_compressed_tar_is_read_and_refused_where_it_is_cut(mode, tmp_path, refused):
    members = [item for number in range(6) for item in sample(number)]
    write_tar(tmp_path / 'set' / f'train.tar.{mode[2:]}', members, mode)
    assert len(decoded(load_split(str(tmp_path / 'set'), None, True))) == 6
    file = next((tmp_path / 'set').iterdir())
    data = file.read_bytes()
    with refused('cut'):
        write(tmp_path / 'cut', file.name, data=data[:len(data) // 2])
        load_split(str(tmp_path / 'cut'), None, True)
    for lost in (8, 20, 60, 100, 150, 200, 300, 400):
        write(tmp_path / f'cut {lost}', file.name, data=data[:-lost])
        try:  # what is beyond the samples and the end of the archive may be missing
            assert len(load_split(str(tmp_path / f'cut {lost}'), None, True)) == 6
        except InputError as error:
            assert 'cannot be read' in str(error)


@pytest.mark.parametrize('mode', ['w', 'w:gz', 'w:bz2', 'w:xz'])
@pytest.mark.parametrize('streaming', [False, True])
@pytest.mark.parametrize('blocks', [4, 5])
def test_a_compressed_tar_that_was_cut_before_it_was_compressed_is_refused(
        mode, streaming, blocks, tmp_path, refused):
    write_tar(tmp_path / 'whole.tar', [item for number in range(6) for item in sample(number)])
    with tarfile.open(tmp_path / 'whole.tar') as opened:
        end = opened.getmembers()[blocks].offset
    packed = {'w': bytes, 'w:gz': gzip.compress, 'w:bz2': bz2.compress, 'w:xz': lzma.compress}[mode](
        (tmp_path / 'whole.tar').read_bytes()[:end])
    write(tmp_path / 'set', f'train.tar.{mode[2:]}'.rstrip('.'), data=packed)
    with refused('cut short'):
        list(load_split(str(tmp_path / 'set'), None, True, streaming))


def test_a_tar_that_is_compressed_in_a_way_that_is_not_read_is_told(tmp_path, refused):
    write(tmp_path, 'train.tar.zst', data=b'\x28\xb5\x2f\xfd' + bytes(100))
    with refused('train.tar.zst', 'Zstandard' if sys.version_info < (3, 14) else 'cannot be read'):
        load_split(str(tmp_path), None, True)


@pytest.mark.parametrize('streaming', [False, True])
@pytest.mark.parametrize('kind', [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_link_in_a_tar_is_refused_and_no_sample_is_lost(kind, streaming, tmp_path, refused):
    write_tar(tmp_path / 'train.tar', [item for number in range(6) for item in sample(number)])
    with tarfile.open(tmp_path / 'train.tar', 'a') as file:
        for ending in ('jpg', 'cls'):
            about = tarfile.TarInfo(f'006.{ending}')
            about.type, about.linkname = kind, f'000.{ending}'
            file.addfile(about)
    with refused('train.tar', '006.jpg is a link to 000.jpg', '--hard-dereference'):
        list(load_split(str(tmp_path), None, True, streaming))


@pytest.mark.parametrize('size', [0, 3, 400, -1])
def test_a_parquet_file_that_is_cut_short_is_named(size, tmp_path, refused, capfd):
    for number in range(2):
        write_files('parquet', tmp_path / 'set', f'train-{number}')
    assert len(load_split(str(tmp_path / 'set'), None, True)) == 12
    file = tmp_path / 'set' / 'train-1.parquet'
    file.write_bytes(file.read_bytes()[:size])
    capfd.readouterr()
    with refused('train-1.parquet', 'cut short', 'copy'):
        load_split(str(tmp_path / 'set'), None, True)
    assert capfd.readouterr().err == ''


def test_arrow_files_that_are_cut_between_their_batches_are_refused(tmp_path, refused):
    write_files('arrow', tmp_path / 'set', 'train')
    assert len(load_split(str(tmp_path / 'set'), None, True)) == 6
    file, whole = tmp_path / 'set' / 'train.arrow', (tmp_path / 'set' / 'train.arrow').read_bytes()
    # Without its end, Arrow itself reads the batches that are there.
    assert len(pa.ipc.open_stream(whole[:-8]).read_all()) == 6
    for cut in (len(whole) - 8, len(whole) - 100):
        file.write_bytes(whole[:cut])
        with refused('train.arrow', 'cut short'):
            load_split(str(tmp_path / 'set'), None, True)
    rows = datasets.Dataset.from_dict({'image': [dict(bytes=picture(), path=None)] * 4})
    rows.save_to_disk(tmp_path / 'disk')
    file = next((tmp_path / 'disk').glob('*.arrow'))
    file.write_bytes(file.read_bytes()[:-8])
    with refused('.arrow', 'cut short'):
        load_split(str(tmp_path / 'disk'), None, True)


def test_a_zip_that_is_cut_short_is_refused(tmp_path, refused):
    with zipfile.ZipFile(tmp_path / 'train.zip', 'w') as file:
        for number in range(9):
            file.writestr(f'{number % 3}/{number}.png', picture(number))
    (tmp_path / 'train.zip').write_bytes((tmp_path / 'train.zip').read_bytes()[:-60])
    with refused(str(tmp_path), 'cannot be loaded'):
        load_split(str(tmp_path), None, True)


# Tar files


def tar_rows(tmp_path, members, streaming):
    write_tar(tmp_path / 'train.tar', members)
    rows = load_split(str(tmp_path), None, True, streaming)
    return [row['jpg'] for row in rows.decode(False)] if streaming else [
        sample['view'] for sample in decoded(rows)]


@pytest.mark.parametrize('streaming', [False, True])
@pytest.mark.parametrize('number, kind', [(20, 'png'), (2, 'png'), (9, 'JPG'), (3, 'v1.jpeg'), (23, 'webp.png')])
def test_an_image_under_another_ending_is_read(number, kind, streaming, tmp_path):
    members = [item for other in range(24) for item in sample(other, kind if other == number else 'jpg')]
    found = tar_rows(tmp_path, members, streaming)
    assert len(found) == 24
    if streaming:
        assert found[number]['bytes'] == members[2 * number][1] and found[number]['path'] == f'{number:03d}.{kind}'
    else:
        assert all(abs(value - other * 7) < 4 for other, value in enumerate(found))


@pytest.mark.parametrize('streaming', [False, True])
@pytest.mark.parametrize('number', [3, 17])
def test_a_sample_without_an_image_is_named_with_its_endings(number, streaming, tmp_path, refused):
    members = [item for other in range(24) for item in (sample(other) if other != number else sample(other)[1:])]
    with refused(f'{number:03d}', 'no jpg', 'only cls', 'train.tar'):
        tar_rows(tmp_path, members, streaming)


def test_a_mask_beside_an_image_does_not_take_its_place(tmp_path, refused):
    members = [item for number in range(8) for item in [
        *sample(number), (f'{number:03d}.seg.png', picture(200))][number == 6:]]
    write_tar(tmp_path / 'train.tar', members)
    rows = load_split(str(tmp_path), None, True)
    with refused('sample 6', 'empty'):
        decoded(rows)


def test_a_sample_without_a_label_has_none(tmp_path):
    for number in (0, 2, 9):
        write_tar(tmp_path / str(number) / 'train.tar', [
            item for other in range(12) for item in sample(other, label=other != number)])
        rows = load_split(str(tmp_path / str(number)), None, True)
        assert [sample['label'] for sample in decoded(rows)] == [
            -1 if other == number else other % 3 for other in range(12)]


@pytest.mark.parametrize('members, words', [
    ([], ('holds no samples',)), ([('000.cls', b'cat')], ("'cat'",)),
    ([*sample(0), *sample(1), *sample(1)], ('Duplicate', '001')), ([('000.json', b'{')], ('train.tar',))])
@pytest.mark.parametrize('streaming', [False, True])
def test_what_is_wrong_in_a_tar_is_one_sentence(members, words, streaming, tmp_path, refused):
    write_tar(tmp_path / 'train.tar', members)
    with refused(*words):
        list(load_split(str(tmp_path), None, True, streaming))


def test_dots_in_names_are_those_of_webdataset(tmp_path, refused):
    members = [item for number in range(6) for item in sample(number, key='img.{:03d}')]
    write_tar(tmp_path / 'train.tar', members)
    with refused('no image column', '000.jpg', '--input-key'):
        decoded(load_split(str(tmp_path), None, True))


# What loaders say


def test_a_loaders_whole_reason_is_given(tmp_path, refused):
    write_files('parquet', tmp_path, 'train')
    rows = datasets.Dataset.from_parquet(str(tmp_path / 'train.parquet'))
    rows.add_column('source', ['x'] * 6).to_parquet(tmp_path / 'validation.parquet')
    with refused('columns', "'source'"):
        load_split(str(tmp_path), None, True)


def test_class_folders_in_a_zip_are_refused_with_what_to_do(tmp_path, refused):
    with zipfile.ZipFile(tmp_path / 'train.zip', 'w') as file:
        for number in range(6):
            file.writestr(f'{number % 2}/{number}.png', picture(number))
    with refused('zip', 'classes', 'unpack'):
        load_split(str(tmp_path), None, True)


def test_a_configuration_is_named_after_a_colon(tmp_path, refused):
    for config in ('small', 'large'):
        write_files('parquet', tmp_path / config, 'train', 6 if config == 'small' else 9)
    (tmp_path / 'README.md').write_text('---\nconfigs:\n' + ''.join(
        f'- config_name: {config}\n  data_files: {config}/train.parquet\n' for config in ('small', 'large')) + '---\n')
    with refused('small', 'large', 'after a colon', ':CONFIGURATION'):
        load_split(str(tmp_path), None, True)
    assert [len(load_split(f'{tmp_path}:{config}', None, True)) for config in ('small', 'large')] == [6, 9]
    with refused('medium', 'small', 'large'):
        load_split(f'{tmp_path}:medium', None, True)


# Parquet of others


@pytest.mark.parametrize('column', ['struct', 'bytes', 'large_binary', 'without path', 'order',
    pytest.param('binary_view', marks=pytest.mark.skipif(
        int(pa.__version__.partition('.')[0]) < 24, reason='pyarrow before 24 refuses it'))])
def test_parquet_that_others_wrote_is_read_as_images(column, tmp_path):
    contents = [picture(number) for number in range(9)]
    values = {
        'struct': pa.array([dict(bytes=data, path=f'{number}.png') for number, data in enumerate(contents)]),
        'bytes': pa.array(contents), 'large_binary': pa.array(contents, pa.large_binary()),
        'binary_view': pa.array(contents, pa.binary_view()),
        'without path': pa.array([dict(bytes=data) for data in contents]),
        'order': pa.array([dict(path=None, bytes=data) for data in contents])}[column]
    pq.write_table(pa.table({'image': values, 'label': list(range(9))}), tmp_path / 'train.parquet')
    for rows in (load_split(str(tmp_path), None, True), load_split(str(tmp_path), 'train[2:]', True)):
        assert [sample['view'] for sample in decoded(rows)] == [7 * label for label in rows['label']]
        sources = [dict(bytes=contents[label], path=None) for label in rows['label']]
        expected = datasets.Dataset.from_dict({'image': sources, 'label': rows['label'][:]})
        assert dataset_fingerprint(rows) == dataset_fingerprint(expected.cast_column('image', datasets.Image()))


def test_parquet_of_pandas_is_read(tmp_path):
    frame = pd.DataFrame({'image': [dict(bytes=picture(number), path=None) for number in range(4)], 'label': range(4)})
    frame.iloc[::-1].to_parquet(tmp_path / 'train.parquet')
    assert [(sample['view'], sample['label']) for sample in decoded(load_split(str(tmp_path), None, True))] == [
        (21, 3), (14, 2), (7, 1), (0, 0)]


@pytest.mark.parametrize('values', [['a.png'], [[[1, 2], [3, 4]]], [1.5], [{'data': b'x'}]])
def test_a_column_that_holds_no_images_is_refused_with_the_remedy(values, tmp_path, refused):
    pq.write_table(pa.table({'image': pa.array(values)}), tmp_path / 'train.parquet')
    with refused("'image'", 'not images', 'cast_column', 'docs/data.md'):
        decoded(load_split(str(tmp_path), None, True))


# Files that rows name


@pytest.mark.parametrize('name', ['train.parquet', 'train.tar', 'metadata.csv', 'train.csv'])
def test_a_pipe_among_the_files_of_a_data_set_is_refused(name, tmp_path, refused):
    write(tmp_path, 'train/ant/1.png')
    os.mkfifo(tmp_path / name)
    if name.endswith(('parquet', 'tar')):
        os.mkfifo(tmp_path / f'other {name}')
    with refused(name, 'no regular file') if name != 'train.csv' else nullcontext():
        load_split(str(tmp_path), None, True)


@pytest.mark.parametrize('name', ['../outside.arrow', 'pipe', '/dev/zero', 'gone.arrow'])
def test_saved_data_that_name_other_files_are_refused(name, tmp_path, refused):
    rows = datasets.Dataset.from_dict({'image': [dict(bytes=picture(), path=None)]})
    datasets.DatasetDict({'train': rows}).save_to_disk(tmp_path / 'disk')
    state = tmp_path / 'disk' / 'train' / 'state.json'
    shutil.copy(next(state.parent.glob('*.arrow')), tmp_path / 'disk' / 'outside.arrow')
    os.mkfifo(state.parent / 'pipe')
    state.write_text(json.dumps({**json.loads(state.read_text()), '_data_files': [{'filename': name}]}))
    with refused(name, 'no file beside it'):
        load_split(str(tmp_path / 'disk'), None, True)


def write_paths(root, *paths):
    """An Arrow file whose rows name their images, and hold none."""
    images = pa.array([dict(bytes=None, path=str(path)) for path in paths], datasets.Image().pa_type)
    rows = datasets.Dataset(pa.table({'image': images, 'name': [str(path) for path in paths]}))
    rows = rows.cast_column('image', datasets.Image())
    with pa.OSFile(str(root / 'train.arrow'), 'wb') as file, pa.ipc.new_stream(file, rows.data.schema) as out:
        out.write_table(rows.data.table)


@pytest.mark.parametrize('streaming', [False, True])
@pytest.mark.parametrize('target', ['outside.png', 'pipe', '/dev/zero', 'file address', 'zip outside', 'up', 'folder'])
def test_a_row_names_no_file_outside_its_data_set_and_no_pipe_or_device(target, streaming, tmp_path, refused):
    root = tmp_path / 'set'
    root.mkdir()
    write(tmp_path, 'outside.png')
    os.mkfifo(root / 'pipe')
    with zipfile.ZipFile(tmp_path / 'outside.zip', 'w') as file:
        file.writestr('1.png', picture())
    path = {
        'outside.png': tmp_path / 'outside.png', 'pipe': root / 'pipe', 'up': root / '..' / 'outside.png',
        'file address': (tmp_path / 'outside.png').as_uri(), 'zip outside': f'zip://1.png::{tmp_path}/outside.zip',
        'folder': root}.get(target, target)
    write_paths(root, path)
    word = {'pipe': 'no regular file', 'file address': 'https://', 'folder': 'no regular file'}.get(target, 'outside')
    loaded = load_split(str(root), None, True, streaming)
    with refused(word):
        if streaming:
            keyed_fingerprint(loaded, 'name')
        else:
            decoded(loaded)
    if not streaming:
        with refused(word):
            dataset_fingerprint(loaded)


def test_a_row_may_name_a_file_of_its_folder_and_one_of_ones_own_any(tmp_path):
    write(tmp_path / 'set' / 'images', '1.png')
    write(tmp_path, 'elsewhere.png')
    write_paths(tmp_path / 'set', tmp_path / 'set' / 'images' / '1.png')
    (tmp_path / 'set' / 'train.arrow').rename(tmp_path / 'set' / 'images' / 'train.arrow')
    write_paths(tmp_path / 'set', tmp_path / 'set' / 'images' / '1.png', tmp_path / 'set' / 'images' / '1.png')
    assert len(decoded(load_split(str(tmp_path / 'set'), None, True))) == 3
    own = datasets.Dataset.from_dict({'image': [str(tmp_path / 'elsewhere.png')]})
    assert len(decoded(own.cast_column('image', datasets.Image()))) == 1


def test_many_files_are_found_without_a_bar_for_each_look_at_them(tmp_path, capsys, monkeypatch):
    """As on a terminal, where `datasets` would draw six; the bars of what takes long stay."""
    rows = datasets.Dataset.from_dict({'image': [b'1', b'2'], 'label': [0, 1]})
    for split in ('train', 'test'):
        for number in range(20):
            rows.to_parquet(str(tmp_path / f'{split}-{number:05d}.parquet'))
    datasets.enable_progress_bars()
    capsys.readouterr()
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    assert len(load_split(str(tmp_path), None, is_training=True)) == 40
    said = capsys.readouterr().err
    assert 'Resolving' not in said and not datasets.are_progress_bars_disabled()
