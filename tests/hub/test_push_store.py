"""Stores on their way to the Hub, with the real clients, and what is published beside the shards."""

import argparse
import io
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from huggingface_hub import DatasetCard
from PIL import Image
from support import hub_programs
from support.flags import DATA
from support.files import flip_bit, tree
from support.programs import refusal
from support.hub_server import READ_TOKEN, TOKEN, card_problems
from support.waiting import wait_until

from timm_tinyvit import cli
from timm_tinyvit.base.errors import InputError
from timm_tinyvit.base.leases import Leases
from timm_tinyvit.data.dataset import SparseLogitDataset
from timm_tinyvit.hub import push_store as publish_store, store_card
from timm_tinyvit.hub.model_card import PACKAGE
from timm_tinyvit.hub.store_card import card_statistics
from timm_tinyvit.data.sources import data_name
from timm_tinyvit.report.labels import LabelledViews, labelled_views, teacher_classes
from timm_tinyvit.store.local import LogitStore
from timm_tinyvit.teacher.creating import create_teacher

FIRST = ['--dataset', DATA, '--train-split', 'train[:120]']
BESIDES = {'store.json', 'README.md', 'sample.parquet'}
DIGESTS = {f'images/shard-{shard:05d}.digests' for shard in range(6)}


@pytest.fixture
def store(filled_store, tmp_path) -> Path:
    """A copy of the store, to be changed."""
    return shutil.copytree(filled_store, tmp_path / 'store')


@pytest.fixture
def push(hub, hub_children, tmp_path):
    """`push([store, flag, ...], ...)` runs `timm-tinyvit store push`, or with a teacher `fill`, for each list, in
    commits of 10 files, one after the other in a process whose Hub is the server; returns status, stdout and stderr of
    each."""

    def push(*commands, start=False, **environment):
        commands = [
            ['fill', '--logits', store, '--push-to-hub', 'org/logits', *flags] if '--teacher' in flags else
            ['store', 'push', store, *flags, *([] if '--repo' in flags else ['--repo', 'org/logits'])]
            for store, *flags in commands]
        child = hub_children.start(
            hub_programs.push_stores, hub.environment(tmp_path / 'home', **environment), *commands)
        if start:
            return child
        ended = child.wait()
        assert ended.returncode == 0 and 'Traceback' not in ended.stderr, ended.stderr
        return json.loads(ended.stdout.splitlines()[-1])

    return push


def published(hub, repo='org/logits') -> dict[str, bytes]:
    return hub.files(repo, 'dataset')


def messages(hub) -> list[str]:
    return [commit.message for commit in hub.commits('org/logits', 'dataset')[1:]]


def test_a_store_arrives_shards_first_and_is_not_pushed_twice(hub, push, filled_store, keyed_store, tmp_path):
    (status, said, _), = push([filled_store, *FIRST, '--private'])
    assert status == 0 and 'pushed to hf://datasets/org/logits: 4 epochs' in said
    commits = hub.commits('org/logits', 'dataset')
    added = [set(after.files) - set(before.files) for before, after in zip(commits, commits[1:])]
    assert [len(files) for files in added[:-1]] == [10, 10, 4]
    assert added[-1] == BESIDES | DIGESTS | {'views.png'}
    there = published(hub)
    assert {name: there[name] for name in tree(filled_store, hidden=False)} == tree(filled_store, hidden=False)
    assert hub.repos['dataset', 'org/logits'].private
    assert card_problems(there['README.md'].decode()) == ([], [])
    assert f'[timm_tinyvit]({PACKAGE})' in there['README.md'].decode()
    assert len(there['views.png']) < 300_000 and Image.open(io.BytesIO(there['views.png'])).width > 500
    # Without the data set nothing that it gave is taken away, and with it the same bytes come out.
    *ends, keyed = push([filled_store], [filled_store, *FIRST], [keyed_store[1], '--repo', 'org/keyed'])
    assert all(status == 0 and 'nothing was pushed' in said for status, said, _ in ends), ends
    commits_of_keyed = hub.commits('org/keyed', 'dataset')
    assert keyed[0] == 0 and set(commits_of_keyed[-1].files) - set(commits_of_keyed[-2].files) == {
        *BESIDES, 'keys.arrow', *sorted(DIGESTS)[:4]}
    mark = json.loads((filled_store / '.published').read_text())
    assert mark == {'url': f'hf://datasets/org/logits@{commits[-1].oid}',
                    'identity': LogitStore.open(filled_store).manifest.identity, 'epochs': [0, 4]}
    assert hub.commits('org/logits', 'dataset') == commits
    files = [path for path in (tmp_path / 'home').rglob('*') if path.is_file()]
    assert not [name for name, content in there.items() if TOKEN.encode() in content]
    assert files and not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in said + str(ends)


def test_a_push_that_is_killed_leaves_no_manifest_and_the_next_one_sends_what_is_missing(hub, push, filled_store):
    hub.fail('POST /api/datasets/org/logits/commit/', 'hang', skip=1, seconds=60)
    child = push([filled_store], start=True)
    wait_until(lambda: len(hub.seen('POST /api/datasets/org/logits/commit/')) == 2)
    child.kill(signal.SIGKILL)
    child.wait()
    assert len(published(hub)) == 10 and 'store.json' not in published(hub)
    hub.forget()
    # And it goes on through what breaks by itself.
    hub.fail('PUT /storage/upload', 'cut')
    hub.fail('POST /api/datasets/org/logits/commit/', '500', skip=1)
    (status, said, _), = push([filled_store])
    assert status == 0 and 'give --dataset' in said
    assert set(published(hub)) == set(tree(filled_store, hidden=False)) | BESIDES
    # Of 24 shards the 4 of the third commit, as those of the second had been sent before the kill; and the sample. The
    # digests of 20 images have 176 bytes.
    assert len({request.path for request in hub.seen('PUT /storage/upload') if '/176/' not in request.path}) == 5
    assert 'views.png' not in published(hub)['README.md'].decode()


def test_a_store_that_has_grown_is_pushed_again(hub, push, filled_store, store, one_sentence):
    for epoch in (2, 3):
        shutil.rmtree(store / f'epoch-0000{epoch}')
    whole, part, gap = push([store], [store, '--epochs', '0:2'], [filled_store, '--epochs', '3:4'])
    assert (whole[0], part[0], gap[0]) == (2, 0, 2)
    one_sentence(whole[2].strip(), '12 shards', 'epoch 2', '--epochs 0:2')
    one_sentence(gap[2].strip(), '0:2', '3:4', 'gap')
    there = published(hub)
    assert json.loads(there['store.json'])['epochs'] == 2 and len(there) == 12 + 3 + 6
    # Only the new ones, as where the first are no longer on this disk; the licence of the owner stays.
    card = there['README.md'].decode().replace('pretty_name', 'license: cc-by-4.0\npretty_name', 1)
    hub.add_commit('org/logits', {'README.md': card.encode()}, repo_type='dataset')
    before = len(messages(hub))
    (status, *_), = push([filled_store, '--epochs', '2:4', *FIRST])
    assert status == 0
    there = published(hub)
    manifest = json.loads(there['store.json'])
    assert (manifest['first_epoch'], manifest['epochs']) == (0, 4) and len(there) == 24 + 4 + 6
    assert {name: there[name] for name in tree(filled_store, hidden=False)} == tree(filled_store, hidden=False)
    assert messages(hub)[before:] == ['Shards of epoch-00002 to epoch-00003', 'Shards of epoch-00003',
                                      'Store of 4 epochs, 120 samples']
    assert DatasetCard(there['README.md'].decode()).data.license == 'cc-by-4.0'
    # A licence alone changes nothing else of what was made with the data.
    (status, *_), = push([filled_store, '--license', 'cc0-1.0'])
    card, before = (DatasetCard(files['README.md'].decode()) for files in (published(hub), there))
    assert status == 0 and card.text == before.text and '](views.png)' in card.text
    assert card.data.to_dict() == before.data.to_dict() | {'license': 'cc0-1.0'}
    assert published(hub)['sample.parquet'] == there['sample.parquet']
    commits = len(messages(hub))
    assert push([filled_store, '--license', 'cc0-1.0'])[0][0] == 0 and len(messages(hub)) == commits


def test_what_may_not_be_pushed_is_one_sentence_and_touches_nothing(
        hub, push, filled_store, store, tmp_path, one_sentence):
    hub.add_commit('org/images', {'README.md': b'# Pictures', 'data/train.parquet': b'PAR1'}, repo_type='dataset')
    hub.add_commit('org/words', {'README.md': b'---\nlicense: mit\n---\nWords of its owner.'}, repo_type='dataset')
    other = tree(filled_store, hidden=False)
    manifest = json.loads(other['store.json'])
    other['store.json'] = json.dumps({**manifest, 'seed': 5}).encode()
    hub.add_commit('org/other', other, repo_type='dataset')
    whole = tree(filled_store, hidden=False)
    lacking = {name: content for name, content in whole.items() if 'epoch-00001/' not in name}
    hub.add_commit('org/lacking', lacking, repo_type='dataset')
    damaged = store / 'epoch-00002' / 'shard-00004.arrow'
    flip_bit(damaged)
    expected = [
        (filled_store, 'images', ['something else', 'data/train.parquet']),
        (filled_store, 'words', ['something else', 'README.md']),
        (filled_store, 'other', ['another store', 'seed: 5, not 0']),
        (store, 'logits', ['1 problem(s)', 'nothing was pushed']),
    ]
    ends = push(*([path, '--repo', f'org/{repo}'] for path, repo, _ in expected),
                [filled_store, '--repo', 'org/lacking', '--epochs', '2:4', '--license', 'mit'])
    refused = push([filled_store, '--repo', 'org/new'], HF_TOKEN=READ_TOKEN)
    for (status, _, said), words in zip(ends + refused, [words for *_, words in expected] + [
            ['lacks 6 shards', 'epoch 1'], ['write']]):
        assert status == 2
        one_sentence(said.strip().splitlines()[-1], *words)
    counts = {'images': 2, 'words': 2, 'other': 2, 'lacking': 2, 'logits': 1}
    assert {repo: len(hub.commits(f'org/{repo}', 'dataset')) for repo in counts} == counts


def test_a_push_goes_on_where_one_on_another_machine_died(hub, push, store):
    Leases.path(store / '.published').write_text('{"machine": "another", "pid": 5, "started": "1", "heartbeat": 3}')
    (status, said, _), = push([store])
    assert status == 0 and said.count('by another process; waiting') == 1 and 'pushed to' in said
    assert 'store.json' in published(hub)


def test_a_push_waits_for_one_that_lives_and_says_so_once(store, monkeypatch, capsys):
    opened, sleeps = LogitStore.open(store), []
    with Leases() as theirs, Leases() as ours:
        assert theirs.acquire(store / '.published')

        def sleep(seconds):
            sleeps.append(seconds)
            if len(sleeps) == 3:
                theirs.release(store / '.published')

        monkeypatch.setattr(publish_store, 'time', SimpleNamespace(sleep=sleep))
        assert publish_store._wait_for(ours, opened)
        assert not ours.acquire(store / '.published')
    assert sleeps == [1, 1, 1]
    with Leases() as leases:
        assert not publish_store._wait_for(leases, opened)


def test_a_store_is_filled_and_pushed_in_one_command_and_its_sample_is_what_datasets_loads(
        hub, hub_children, push, teacher, tmp_path):
    hub.add_commit('org/logits', {'README.md': b'---\nlicense: cc-by-nc-4.0\n---\n'}, repo_type='dataset')
    fill = ['--dataset', DATA, '--teacher', teacher, '--epochs', '2', '--config', 'demo', '--workers', '0']
    first, second = push([tmp_path / 'new', *fill, '--train-split', 'train[:30]'],
                         [tmp_path / 'second', *fill, '--train-split', 'train[:40]'])
    assert first[0] == 0, first
    there = published(hub)
    # The recipe is the trainer's; what it says of the views and the store counts.
    manifest = json.loads(there['store.json'])
    assert (manifest['k'], manifest['shard_size'], manifest['recipe']['re_prob']) == (3, 300, 0.25)
    card = DatasetCard(there['README.md'].decode())
    assert card.data.license == 'cc-by-nc-4.0'
    assert '| Top-1 accuracy |' in card.text and '](views.png)' in card.text
    # What would be refused in the end is refused before the teacher is asked.
    assert second[0] == 2 and 'another store' in second[2]
    assert not list((tmp_path / 'second').rglob('shard-*'))
    # The viewer and `datasets` see the sample alone.
    loaded = hub_children.run(hub_programs.load_sample, hub.environment(tmp_path / 'home'))
    assert loaded.stdout.splitlines() == [
        "['train'] 60 ['sample']",
        "['classes', 'epoch', 'index', 'label', 'label_name', 'names', 'probabilities', 'rest']"]


@pytest.fixture(scope='module')
def views(filled_store) -> tuple[LogitStore, LabelledViews]:
    opened = LogitStore.open(filled_store)
    return opened, labelled_views(opened, DATA, 'train[:120]')


def test_the_sample_says_what_the_teacher_says(views, teacher):
    store, data = views
    table = pq.read_table(io.BytesIO(store_card.parquet_bytes(store_card.sample_table(store, range(1, 4), data))))
    assert len(table) == 360 and set(table['epoch'].to_pylist()) == {1, 2, 3}
    row = table.to_pylist()[200]
    sample = data.views[row['epoch'], row['index']]
    model = timm.create_model(f'local-dir:{teacher}', pretrained=True).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ('mean', 'std'))
    with torch.inference_mode():
        probs = model(((sample['view'] / 255 - mean) / std)[None]).softmax(dim=1)[0]
    best = probs.argsort(descending=True)[:3].tolist()
    assert row['label'] == sample['label'] and row['label_name'] == data.class_names[sample['label']]
    assert row['names'] == [data.class_names[index] for index in row['classes']] and row['classes'] == best
    assert row['probabilities'] == pytest.approx(probs[best].tolist(), abs=0.03)
    assert row['rest'] == pytest.approx(1 - sum(row['probabilities']), abs=1e-6)


def test_a_store_alone_has_a_plain_sample_and_imagenet_its_names(views, monkeypatch):
    store, _ = views
    monkeypatch.setattr(store, 'manifest', replace(store.manifest, class_names=[]))
    table = store_card.sample_table(store, [0])
    assert table.column_names == ['epoch', 'index', 'classes', 'probabilities', 'rest'] and len(table) == 120
    manifest = replace(store.manifest, num_classes=1000, teacher={'name': 'tiny_vit_21m_224.dist_in22k_ft_in1k'})
    assert teacher_classes(manifest)[:2] == ['tench, Tinca tinca', 'goldfish, Carassius auratus']
    assert teacher_classes(replace(manifest, num_classes=999)) is None
    assert teacher_classes(replace(manifest, num_classes=21841,
                                              teacher={'name': 'clip_vit_large_patch14_224.in22k'}))[0]


def test_a_picture_of_any_views_stays_small(views, monkeypatch):
    store, data = views
    statistics = card_statistics(store, range(4), data)
    picture = Image.open(io.BytesIO(store_card.draw_views(data, statistics)))
    assert picture.format == 'PNG'
    # Noise of 256 pixels does not compress: the tiles get smaller.
    noise = torch.randint(0, 256, (4, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    samples = data.views.__getitems__([(0, 0)] * 4)
    for sample, view in zip(samples, noise):
        sample['view'] = view
    monkeypatch.setattr(SparseLogitDataset, '__getitems__', lambda self, keys: samples)
    content = store_card.draw_views(data, statistics)
    assert 100_000 < len(content) <= store_card.MAX_PICTURE_BYTES


FILL = ['fill', '--dataset', 'x', '--teacher', 't', '--epochs', '1', '--logits', 'here']


@pytest.mark.parametrize('argv, words', [
    ([*FILL, '--push-to-hub', 'logits'], ['ORG/NAME']),
    ([*FILL, '--push-to-hub', 'org/logits', '--shards', '0:2'], ['--shards', 'timm-tinyvit store push']),
    ([*FILL, '--hub-private'], ['--push-to-hub']),
    (['store', 'push', 'here', '--repo', 'logits'], ['ORG/NAME']),
])
def test_flags_that_do_not_go_together_are_one_sentence(argv, words, capsys, one_sentence):
    one_sentence(refusal(cli.main, argv, capsys), *words)


def with_manifest(store, **changes):
    """The store on disk with another manifest, as if it had been filled that way."""
    file = store / 'store.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_data_with_fewer_classes_than_the_teacher_are_named_by_themselves_and_have_no_accuracy(
        hub, push, teacher, fashion, tmp_path, capsys):
    """Three classes for a teacher of ten: a class is no label, and no name of the data is that of a class."""
    rows = fashion.filter(lambda label: label < 3, input_columns='label').select(range(30))
    names = datasets.ClassLabel(names=['first', 'second', 'third'])
    rows.cast_column('label', names).save_to_disk(tmp_path / 'three')
    flags = ['--dataset', tmp_path / 'three']
    filled, again = push(
        [tmp_path / 'store', *flags, '--teacher', teacher, '--epochs', '1', '--img-size', '32', '--workers', '0'],
        [tmp_path / 'store', *flags])
    assert filled[0] == again[0] == 0, (filled, again)
    there = published(hub)
    card = there['README.md'].decode()
    assert 'no accuracy, as the data have labels of 3 classes, the teacher predicts 10' in card
    assert 'accuracy |' not in card
    table = pq.read_table(io.BytesIO(there['sample.parquet']))
    assert 'names' not in table.column_names and set(table['label_name'].to_pylist()) == {'first', 'second', 'third'}
    cli.main(['store', 'describe', str(tmp_path / 'store'), *map(str, flags)])
    assert 'unknown; the data have labels of 3 classes, the teacher predicts 10' in capsys.readouterr().out


def test_names_of_the_data_and_of_the_teacher_are_kept_apart(views, monkeypatch):
    store, data = views
    manifest, pictures = store.manifest, []
    wide = replace(manifest, num_classes=21841, class_names=[], teacher={'name': 'clip.in22k'})
    monkeypatch.setattr(store, 'manifest', wide)
    row = store_card.sample_table(store, [0], data).to_pylist()[0]
    known = teacher_classes(wide)
    assert row['label_name'] == data.class_names[row['label']]
    assert row['names'] == [known[index] for index in row['classes']]
    monkeypatch.setattr(store_card, 'draw_pictures', lambda rows, _: pictures.extend(sum(rows, [])) or b'')
    store_card.draw_views(data, card_statistics(store, [0], data))
    assert all(picture.caption.removesuffix(', epoch 0') in data.class_names for picture in pictures)
    bars = [bar for picture in pictures for bar in picture.bars if bar.kind != 'rest']
    assert bars and all(bar.name in known and not bar.kind for bar in bars)
    pictures.clear()
    monkeypatch.setattr(store, 'manifest', manifest)
    store_card.draw_views(data, card_statistics(store, [0], data))
    assert all([bar.name for bar in picture.bars if bar.kind == 'label'] == [picture.caption.removesuffix(', epoch 0')]
               for picture in pictures)
    # A teacher of so many classes needs no tag, one of 1,000 does.
    assert teacher_classes(replace(wide, teacher={'name': 'tiny_vit_21m_224'}))
    assert not teacher_classes(replace(wide, num_classes=1000, teacher={'name': 'resnet18'}))


def test_what_cannot_be_made_for_the_last_commit_shows_before_the_first_shard(views, monkeypatch, refused):
    store, data = views
    sent = []
    published = SimpleNamespace(
        repo_id='org/logits', url='hf://datasets/org/logits', card='', files={}, manifest=None, refresh=lambda: None,
        joined=lambda manifest, epochs: manifest, size=publish_store.PublishedStore.size)
    published.size = lambda manifest, more=None: publish_store.PublishedStore.size(published, manifest, more)
    monkeypatch.setattr(publish_store, 'push_files', lambda repo, files, *_: sent.extend(files))
    monkeypatch.setattr(publish_store, 'draw_views', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        publish_store.publish_store(store, published, data=data)
    assert not sent


def test_a_card_that_was_edited_while_shards_were_sent_keeps_the_edit(views, monkeypatch):
    store, _ = views
    pushed = []
    published = SimpleNamespace(
        repo_id='org/logits', url='hf://datasets/org/logits', card='', files={}, manifest=None,
        joined=lambda manifest, epochs: manifest)

    def refresh():
        published.card = '---\nlicense: cc-by-4.0\nextra_gated_prompt: Be good.\n---\n'
        published.files = {name: 10 for files in pushed for name in files}

    published.refresh = refresh
    published.size = lambda manifest, more=None: publish_store.PublishedStore.size(published, manifest, more)
    monkeypatch.setattr(publish_store, 'push_files', lambda repo, files, *_: pushed.append(files) or 'commit')
    monkeypatch.setattr(publish_store, 'mark_published', lambda *_: None)
    publish_store.publish_store(store, published)
    data = DatasetCard(pushed[-1]['README.md'].decode()).data
    assert data.license == 'cc-by-4.0' and data.get('extra_gated_prompt') == 'Be good.'


def test_what_another_push_has_brought_meanwhile_is_looked_at(views, monkeypatch, refused):
    store, _ = views
    looked = []

    def joined(manifest, epochs):
        raise InputError(f'looked {len(looked)} times')

    published = SimpleNamespace(refresh=lambda: looked.append(1), joined=joined)
    for has_waited in (False, True):
        monkeypatch.setattr(publish_store, '_wait_for', lambda *_, has_waited=has_waited: has_waited)
        with refused(f'looked {int(has_waited)} times'):
            publish_store.publish_store(store, published)


def test_the_card_of_images_without_labels_speaks_of_none(views):
    store, data = views

    def card(data, **changes):
        sample, statistics = (make(store, range(4), data) for make in (store_card.sample_table, card_statistics))
        manifest = replace(store.manifest, **changes)
        return store_card.dataset_card(manifest, 'org/logits', 1000, sample, statistics, data, has_picture=True)

    assert ' `label` and `label_name`, the numbers' in card(data) and 'each with its label' in card(data)
    bare = replace(data, labels=np.full(120, -1), class_names=None)
    assert '`label`' not in card(bare) and 'Some views, each with the most probable classes.' in card(bare)
    assert 'only the total mass is known' in card(bare)
    whole = card(bare, k=store.manifest.num_classes)
    assert 'only the total mass' not in whole and 'of the teacher are complete' in whole


def test_the_picture_has_a_class_in_each_column(views, monkeypatch):
    store, data = views
    drawn = []
    monkeypatch.setattr(store_card, 'draw_pictures', lambda rows, _: drawn.extend(rows) or b'')
    store_card.draw_views(data, card_statistics(store, range(2), data))
    labels = [[picture.caption.partition(', epoch')[0] for picture in row] for row in drawn]
    assert len(labels) == 2 and labels[0] == labels[1] and len(set(labels[0])) == 4
    assert [picture.caption.partition(', ')[2] for row in drawn for picture in row] == ['epoch 0'] * 4 + ['epoch 1'] * 4


def test_no_path_of_a_teacher_is_published(store, tmp_path, monkeypatch):
    manifest = LogitStore.open(store).manifest
    for name in ('local-dir:/secret/teacher', '~/secret/teacher', '/secret/teacher', './secret/teacher'):
        old = replace(manifest, teacher={**manifest.teacher, 'name': name})
        assert publish_store._public(old).teacher['name'] == 'teacher'
        assert publish_store._public(old).identity == old.identity == manifest.identity
    for name in ('hf-hub:org/teacher', 'resnet18.a1_in1k'):
        old = replace(manifest, teacher={**manifest.teacher, 'name': name})
        assert publish_store._public(old) == old
    pushed = {}
    published = SimpleNamespace(
        repo_id='org/logits', url='hf://datasets/org/logits', card='', files={}, revision='1', manifest=None,
        refresh=lambda: setattr(published, 'revision', '2'), joined=lambda manifest, epochs: manifest,
        size=lambda *_: 1000)
    monkeypatch.setattr(publish_store, 'push_files', lambda repo, files, *_: pushed.update(files))
    with_manifest(store, teacher={**manifest.teacher, 'name': 'local-dir:/secret/teacher'})
    publish_store.publish_store(LogitStore.open(store), published)
    assert b'"name": "teacher"' in pushed['store.json'] and b'secret' not in pushed['store.json'] + pushed['README.md']
    # Somebody else had pushed all of it: the commit that is noted is looked up.
    assert json.loads((store / '.published').read_text())['url'] == 'hf://datasets/org/logits@2'


def test_the_card_names_columns_where_their_names_say_nothing(hub, push, teacher, fashion, tmp_path):
    rows = fashion.select(range(20)).rename_columns({'image': 'photo', 'label': 'kind'})
    other = rows.select_columns('photo').rename_column('photo', 'photo2')
    rows = datasets.concatenate_datasets([rows, other], axis=1)
    rows.save_to_disk(tmp_path / 'data')
    flags = ['--dataset', tmp_path / 'data', '--input-key', 'photo', '--target-key', 'kind']
    (status, _, error), = push([
        tmp_path / 'store', *flags, '--teacher', teacher, '--epochs', '1', '--img-size', '32', '--workers', '0'])
    assert status == 0, error
    card = published(hub)['README.md'].decode()
    assert card.count('--dataset DATA --input-key photo --target-key kind') == 2
    # The example reads the data as it stands there, but for its place and the store's.
    code = card.partition('```python\n')[2].partition('```')[0]
    code = code.replace("'DATA'", repr(str(tmp_path / 'data'))).replace(
        'hf://datasets/org/logits', str(tmp_path / 'store'))
    found = {}
    exec(code, found)
    assert found['sample']['view'].shape == (3, 32, 32) and found['sample']['label'] == rows[0]['kind']


def test_a_teacher_is_called_by_its_architecture_and_where_its_weights_come_from(teacher, tmp_path, monkeypatch):
    home = tmp_path / 'home'
    shutil.copytree(teacher, home / 'a.teacher')
    shutil.copytree(teacher, home / 'run' / 'best')
    (home / 'run' / 'run.json').touch()
    monkeypatch.setenv('HOME', str(home))
    weights = str(home / 'a.teacher' / 'model.safetensors')
    for given, checkpoint, name in (
        (f'local-dir:{home}/a.teacher', None, 'a.teacher'), ('~/a.teacher', None, 'a.teacher'),
        ('~/run/best', None, 'run/best'), (f'{home}/a.teacher', f'{home}/run/best/model.safetensors', 'run/best'),
        ('test_resnet.r160_in1k', weights, 'a.teacher'),
    ):
        args = argparse.Namespace(
            teacher=given, teacher_checkpoint=checkpoint, teacher_num_classes=10 if checkpoint else None,
            teacher_amp_dtype=None, teacher_compile=False, class_embeddings=None)
        assert create_teacher(args, torch.device('cpu')).name == f'test_resnet ({name})'


def test_a_data_set_is_called_without_the_path_to_it(tmp_path, monkeypatch):
    (tmp_path / 'images').mkdir()
    monkeypatch.setenv('HOME', str(tmp_path))
    for name in (str(tmp_path / 'images'), '~/images', f'{tmp_path}/images/'):
        assert data_name(name) == ('images', False)
    assert data_name('hfds/org/images') == data_name('org/images') == ('org/images', True)


def card_of(views, data_changes=None, **changes):
    """The card of a store whose manifest says something else."""
    store, data = views
    manifest = replace(store.manifest, **changes)
    data = replace(data, **data_changes) if data_changes else None
    table, statistics = store_card.sample_table(store, [0]), card_statistics(store, [0])
    return DatasetCard(store_card.dataset_card(manifest, 'org/logits', 1000, table, statistics, data))


def test_a_card_of_a_store_names_data_teacher_and_kind(views):
    teacher = {**views[0].manifest.teacher, 'name': 'resnet18.a1_in1k'}
    card = card_of(views, dict(name='org/images', on_hub=True), teacher=teacher)
    assert '[resnet18.a1_in1k](https://huggingface.co/timm/resnet18.a1_in1k)' in card.text
    assert card.data.get('source_datasets') == ['org/images']
    assert card.text.count("--dataset org/images --train-split 'train[:120]' --model tiny_vit_21m_224 \\\n") == 2
    assert card.text.count('    --epochs 4 --logits ') == 2
    assert "load_split('org/images', 'train[:120]', is_training=True)" in card.text
    assert '\n## The sample\n\n`sample.parquet`' in card.text
    assert 'mixed in pairs' not in card.text
    # In a folder: another name serves.
    card = card_of(views, dict(split='train'))
    assert card.data.get('source_datasets') is None and '--dataset DATA --model' in card.text
    assert "load_split('DATA', 'train', is_training=True)" in card.text
    # Nothing is asked of who has no data at hand.
    assert '--dataset DATA --model' in card_of(views).text


def test_a_card_of_a_store_says_that_views_are_mixed(views):
    recipe = {**views[0].manifest.recipe, 'mixup': 0.8}
    assert 'Views are mixed in pairs' in card_of(views, recipe=recipe).text
