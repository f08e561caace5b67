"""Data at addresses: parquet and tar files in an S3 server, and data sets of the Hub by address and revision."""

import io
import tarfile

import datasets
import pytest

from support import hub_programs
from timm_tinyvit.config.commands import add_fill_arguments
from timm_tinyvit.config.arguments import ArgumentParser
from timm_tinyvit.data.dataset import ImageDataset
from timm_tinyvit.data.fingerprint import dataset_fingerprint
from timm_tinyvit.data.sources import data_name, load_split

COUNTS = {'train-0': 9, 'train-1': 7, 'validation': 5}


@pytest.fixture(scope='module', params=['parquet', 'tar'])
def photos(request, tmp_path_factory, fashion, s3_server):
    """A folder of files of one kind, in two splits, and its copy in a bucket."""
    folder, start = tmp_path_factory.mktemp('photos') / request.param, 0
    folder.mkdir()
    for name, count in COUNTS.items():
        rows = fashion.select(range(start, start + count))
        start += count
        if request.param == 'parquet':
            rows.to_parquet(folder / f'{name}.parquet')
            continue
        with tarfile.open(folder / f'{name}.tar', 'w') as archive:
            for number, row in enumerate(rows.cast_column('image', datasets.Image(decode=False))):
                for ending, data in (('png', row['image']['bytes']), ('cls', str(row['label']).encode())):
                    about = tarfile.TarInfo(f'{name}/{number:03d}.{ending}')
                    about.size = len(data)
                    archive.addfile(about, io.BytesIO(data))
    (folder / 'notes.txt').write_text('of no use')
    s3_server.put_tree(f'data/{request.param}', folder)
    return folder


@pytest.fixture(autouse=True)
def s3_user(monkeypatch, s3_server, own_cache):
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)


def images(rows):
    return ImageDataset(rows, lambda image: image.tobytes()).__getitems__(list(range(len(rows))))


def test_files_in_a_bucket_are_the_data_set_that_they_are_in_a_folder(photos, s3_server):
    address = f's3://bucket/data/{photos.name}'
    for split, is_training, count in ((None, True, 16), (None, False, 5), ('train[3:12]', True, 9)):
        here, there = (load_split(name, split, is_training) for name in (str(photos), address))
        assert len(there) == count and dataset_fingerprint(there) == dataset_fingerprint(here)
        assert images(there) == images(here)
    rows = list(load_split(f'{address}/', None, True, streaming=True))
    assert [row['cls' if 'cls' in row else 'label'] for row in rows] == [row['label'] for row in images(
        load_split(str(photos), None, True))]
    assert len(load_split(f'{address}/train-1.{photos.name}', None, True)) == 7
    assert data_name(address) == (photos.name, False)


@pytest.mark.parametrize('address, words', [
    ('s3://bucket/data/none', ('no files',)), ('s3://no-bucket/data', ('bucket',)), ('nothing://x/y', ('nothing',)),
    ('zip://1.parquet::s3://bucket/1.zip', ('chain',))])
def test_an_address_without_data_is_one_sentence(address, words, refused):
    with refused(address, *words):
        load_split(address, None, True)


def test_a_revision_of_a_data_set_on_the_hub_is_read(hub, hub_children, fashion, tmp_path):
    """By its name, its address and by flags."""
    commits = []
    for count in (4, 6):
        file = io.BytesIO()
        fashion.select(range(count)).to_parquet(file)
        commits.append(hub.add_commit('org/images', {'data/train.parquet': file.getvalue()}, repo_type='dataset'))
    parser = ArgumentParser()
    add_fill_arguments(parser)
    flags = '--teacher t --logits s --epochs 1'.split()
    by_flag = parser.parse_args(['org/images', '--dataset-revision', commits[0], '--dataset-config', 'default', *flags])
    names = [f'org/images@{commits[0]}', f'hf://datasets/org/images@{commits[0]}', by_flag.dataset, 'org/images']
    ended = hub_children.run(hub_programs.load_training_splits, hub.environment(tmp_path / 'home'), *names)
    assert ended.stdout == f'{[*[fashion["label"][:4]] * 3, fashion["label"][:6]]}\n'


def test_a_revision_of_a_folder_is_refused(photos, refused):
    parser = ArgumentParser()
    add_fill_arguments(parser)
    for name in (str(photos), 's3://bucket/data'):
        with refused('--dataset-revision', 'not on the Hub'):
            parser.parse_args([name, '--dataset-revision', 'v1', *'--teacher t --logits s --epochs 1'.split()])
