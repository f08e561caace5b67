"""Reports on stores: the figures against a dense computation in numpy, and the pages read back."""

import io
import json
import math
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from support import hub_programs, programs
from support.files import flip_bit
from support.flags import DATA
from support.pages import check_self_contained, pixels_of
from timm_tinyvit import cli, save_logits
from timm_tinyvit.data.dataset import SparseLogitDataset
from timm_tinyvit.data.opening import open_store
from timm_tinyvit.data.pairing import Pairing
from timm_tinyvit.data.sources import load_split
from timm_tinyvit.report import plots
from timm_tinyvit.report.labels import label_mismatch, labelled_views, teacher_classes
from timm_tinyvit.report.page import Bar, Picture
from timm_tinyvit.report.pictures import choose_samples, draw_pictures, show_samples
from timm_tinyvit.report.statistics import filled_shards, store_statistics
from timm_tinyvit.report.store import figures_of, plain_report, store_facts, store_page, text_report
from timm_tinyvit.store.local import LogitStore
from timm_tinyvit.targets.codecs import create_codec
from timm_tinyvit.targets.sparse import SparseTargets
from timm_tinyvit.train.calibration import calibration
from timm_tinyvit.train.predictions import Predictions, confused_pairs

SPLIT = 'train[:120]'
FIRST = ['--dataset', DATA, '--train-split', SPLIT]
KINDS = {'few classes': (3, 'compact'), 'most classes': (6, 'float16'), 'all classes': (7, 'float16')}


@pytest.fixture(scope='module')
def labels():
    return np.array(load_split(DATA, SPLIT, True)['label'])


@pytest.fixture
def make_store(filled_store, tmp_path):
    """A store of 50 samples in 4 epochs of 7 classes, without two shards; `name` is one of `KINDS`."""

    def make(name, **recipe):
        k, codec = KINDS[name]
        like = LogitStore.open(filled_store).manifest
        codec = create_codec(codec, 7, k)
        store = LogitStore.create(tmp_path / name, replace(
            like, num_samples=50, num_classes=7, k=k, record_width=codec.width, shard_size=20, codec=codec.name,
            recipe=like.recipe | recipe, class_names=[]))
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(50, 7, generator=generator)
        for epoch in range(4):
            # Views of an image resemble each other.
            logits = 3 * (image + 0.5 * torch.randn(50, 7, generator=generator))
            records = codec.encode(SparseTargets.from_logits(logits, k))
            for shard in range(3):
                if (epoch, shard) not in ((1, 2), (3, 0)):
                    store.write_shard(epoch, shard, records[20 * shard:20 * shard + 20])
        return store

    return make


def dense_targets(store):
    """What a student learns from, float64 [classes], by (epoch, row), from one record at a time."""
    manifest, found = store.manifest, {}
    for epoch, shards in filled_shards(store, manifest.stored_epochs).items():
        for row in range(manifest.num_samples):
            if row // manifest.shard_size in shards:
                targets = store.codec.decode(torch.from_numpy(store.read(epoch, [row])))
                dense = np.full(manifest.num_classes, np.nan)
                for place in range(targets.k):
                    dense[targets.ids[0, place]] = math.exp(targets.log_probs[0, place])
                rest = 0. if targets.log_rest is None else math.exp(targets.log_rest[0])
                others = np.isnan(dense)
                dense[others] = rest / max(1, others.sum())
                found[epoch, row] = dense, targets.k, ~others
    return found


def entropy(probs):
    return -sum(p * math.log(p) for p in probs if p > 0)


@pytest.mark.parametrize('is_mixed', [False, True], ids=['plain', 'mixed'])
@pytest.mark.parametrize('name', KINDS)
def test_figures_are_those_of_a_dense_computation(make_store, name, is_mixed):
    store = make_store(name, mixup=0.8 if is_mixed else 0.)
    labels = np.random.default_rng(1).integers(7, size=50)
    labels[::9] = -1
    found = store_statistics(store, labels).summary()
    dense = dense_targets(store)
    pairing = Pairing(store.manifest.seed, 50)
    top, right, mine, sure = {}, [], [], []
    for (epoch, row), (probs, _, listed) in dense.items():
        top[epoch, row] = int(np.where(listed, probs, -1).argmax())
        names = {int(labels[row])}
        if is_mixed:
            pair = pairing.pairs_of(epoch, np.array([row]))
            names |= set(labels[pairing.members(epoch, pair)[0]].tolist())
        if labels[row] >= 0:
            mine.append(sum(probs[label] for label in names if label >= 0) if min(names) >= 0 else np.nan)
        if min(names) >= 0:
            right.append(top[epoch, row] in names)
            sure.append(probs[top[epoch, row]])
    assert found['samples'] == 50 and found['views'] == len(dense) == 170 and found['compared_samples'] == 50
    close = dict(rel=1e-5, abs=1e-6)
    assert found['accuracy'] == pytest.approx(np.mean(right), **close)
    assert found['label_probability'] == pytest.approx(np.nanmean(mine), **close)
    assert found['confidence'] == pytest.approx(
        np.mean([dense[key][0][best] for key, best in top.items()]), **close)
    assert found['entropy'] == pytest.approx(np.mean([entropy(probs) for probs, _, _ in dense.values()]), **close)
    for size, mass in found['mass'].items():
        per_epoch = {epoch: [] for epoch in range(4)}
        for (epoch, _), (probs, _, listed) in dense.items():
            per_epoch[epoch].append(np.sort(probs[listed])[::-1][:int(size)].sum())
        assert mass == pytest.approx(np.mean([np.mean(part) for part in per_epoch.values()]), **close)
    rows = range(50)
    pairs = []
    for first, second in combinations(range(4), 2):
        both = [row for row in rows if (first, row) in top and (second, row) in top]
        pairs.append(np.mean([top[first, row] == top[second, row] for row in both]))
    assert found['agreement'] == pytest.approx(np.mean(pairs), **close)
    shares, votes, divergence = [], [], []
    for row in rows:
        views = [epoch for epoch in range(4) if (epoch, row) in top]
        (winner, count), = Counter(sorted(top[epoch, row] for epoch in views)).most_common(1)
        shares.append(count / len(views))
        votes += [winner == labels[row]] if labels[row] >= 0 else []
        probs = [dense[epoch, row][0] for epoch in views]
        mean = np.mean(probs, axis=0)
        divergence.append(np.mean([
            sum(p * math.log(p / q) for p, q in zip(part, mean) if p > 0) for part in probs]))
    assert found['majority'] == pytest.approx(np.mean(shares), **close)
    assert found['unanimous'] == pytest.approx(np.mean(np.array(shares) == 1), **close)
    # Decoded numbers have errors of rounding, so that their sum is not quite 1.
    assert found['disagreement'] == pytest.approx(np.mean(divergence), rel=2e-3, abs=1e-5)
    if is_mixed:
        assert found['majority_accuracy'] is None and found['calibration_error'] is None
        return
    assert found['majority_accuracy'] == pytest.approx(np.mean(votes), **close)
    gap = 0.
    for place in range(15):
        chosen = [number for number, value in enumerate(sure) if place / 15 < value <= (place + 1) / 15]
        if chosen:
            gap += len(chosen) * abs(np.mean([sure[n] for n in chosen]) - np.mean([right[n] for n in chosen]))
    assert found['calibration_error'] == pytest.approx(gap / len(sure), **close)


def test_calibration_by_hand():
    found = calibration(np.array([0., 0.25, 0.5, 0.75, 0.8125, 1.]), np.array([0, 1, 1, 0, 1, 1]), num_bins=4)
    # What lies on a border belongs to the bin below it.
    assert found.count.tolist() == [2, 1, 1, 2]
    assert found.confidence.tolist() == [0.125, 0.5, 0.75, 0.90625] and found.accuracy.tolist() == [0.5, 1, 0, 1]
    assert found.error == (2 * 0.375 + 0.5 + 0.75 + 2 * 0.09375) / 6
    empty = calibration(np.array([0.9]), np.array([True]), num_bins=2)
    assert np.isnan(empty.accuracy[0]) and empty.error == pytest.approx(0.1)


@pytest.mark.parametrize('count, right', [(1, 1), (7, 0), (40, 26), (6000, 5900)])
def test_intervals_of_accuracy_are_those_of_wilson(count, right):
    """Their ends are the shares from which the one that was found is 1.96 standard errors away."""
    found = calibration(np.full(count, 0.7), np.arange(count) < right, num_bins=2)
    low, high = (end[1] for end in found.interval())
    share = right / count
    assert 0 <= low + 1e-12 and low < high and high <= 1 + 1e-12
    for end in (low, high):
        assert abs(share - end) == pytest.approx(1.96 * math.sqrt(max(end * (1 - end), 0) / count), abs=1e-6)
    assert np.isnan([end[0] for end in found.interval()]).all()


def test_a_run_and_a_store_are_calibrated_alike():
    """What lies on a border belongs to the bin below it in both."""
    probs = np.arange(1, 16, dtype=np.float32) / 15
    right = np.arange(15) % 2 == 0
    said = Predictions(np.where(right, 0, 1)[:, None], probs[:, None], np.zeros(15, dtype=np.int64), np.log(probs))
    found, same = said.reliability(), calibration(said.confidence, right)
    assert found.count.tolist() == same.count.tolist() and found.error == same.error
    exact = Predictions(np.zeros((2, 1)), np.array([[0.2], [0.8]]), np.zeros(2, dtype=np.int64), np.zeros(2))
    assert np.flatnonzero(exact.reliability().count).tolist() == [2, 11]


def test_a_bin_of_few_samples_is_drawn_with_a_long_interval():
    found = calibration(np.repeat([0.3, 0.9], [2, 900]), np.ones(902))
    (figure, *_), = plots.reliability_plot({'teacher': found})
    above, below = figure.axes
    few, many = (np.ptp(line[:, 1]) for line in above.collections[0].get_segments())
    assert few > 60 and many < 2
    assert above.get_xlim() == above.get_ylim() == (0, 100) and above.get_ylabel() == 'accuracy (%)'
    assert below.get_xlabel() == 'confidence (%)'


def test_a_sample_is_evenly_spaced_over_what_is_filled_and_reads_no_more(make_store):
    store = make_store('few classes')
    read = []
    found = store_statistics(
        store, epochs=range(4), max_samples=10, max_epochs=2, advance=lambda *counts: read.append(counts))
    assert found.epochs == [0, 3] and found.rows.tolist() == [0, 5, 10, 16, 21, 27, 32, 38, 43, 49]
    assert found.num_views.tolist() == [10, 6]
    assert sum(views for views, _ in read) == 16 and {total for _, total in read} == {16}
    assert (found.top[1, :4] == -1).all() and np.isnan(found.confidence[1, :4]).all()
    # One view of a sample neither agrees with another one nor differs from it.
    for values in (found.disagreement, found.majority()[1]):
        assert np.isnan(values[:4]).all() and np.isfinite(values[4:]).all()
    assert found.summary()['unanimous'] == np.mean(found.majority()[1][4:] == 1) > 0
    only = store_statistics(store, epochs=[3], rows=np.arange(0, 50, 7))
    assert only.rows.tolist() == [21, 28, 35, 42, 49] and np.isnan(only.disagreement).all()
    assert [(part['epoch'], part['views']) for part in only.summary()['epochs']] == [(3, 5)]
    shutil.rmtree(store.path / 'epoch-00002')
    assert store_statistics(store, epochs=[2]) is None and store_statistics(store).epochs == [0, 1, 3]


def test_comparing_samples_in_parts_changes_nothing(make_store, monkeypatch):
    store = make_store('most classes')
    whole = store_statistics(store)
    monkeypatch.setattr('timm_tinyvit.report.statistics.DENSE_ENTRIES', 4 * 7 * 7)
    monkeypatch.setattr('timm_tinyvit.report.statistics.READ_SAMPLES', 9)
    parts = store_statistics(store)
    assert np.array_equal(whole.disagreement, parts.disagreement) and np.allclose(whole.mass, parts.mass, rtol=1e-12)
    # Where memory is short fewer are compared.
    monkeypatch.setattr('timm_tinyvit.report.statistics.KEPT_ENTRIES', 4 * 6 * 10)
    few = store_statistics(store)
    assert np.array_equal(few.disagreement, whole.disagreement[few.compared]) and len(few.compared) == 10


def test_the_chosen_samples_are_the_extreme_ones(make_store):
    store = make_store('few classes')
    labels = np.arange(50) % 7
    statistics = store_statistics(store, labels)
    chosen = choose_samples(statistics)
    dense = dense_targets(store)
    probs = [np.mean([dense[epoch, row][0][labels[row]] for epoch in range(4) if (epoch, row) in dense])
             for row in range(50)]
    assert chosen['hardest'].tolist() == np.argsort(probs)[:4].tolist()
    best = [max(range(label, 50, 7), key=probs.__getitem__) for label in range(7)]
    assert set(chosen['easiest']) == set(sorted(best, key=probs.__getitem__)[-4:])
    assert chosen['disputed'].tolist() == np.argsort(-statistics.disagreement)[:4].tolist()
    assert len(set(labels[chosen['varied']])) == 7 and len(set(chosen['varied'])) == 8
    entropies = [np.mean([entropy(dense[epoch, row][0]) for epoch in range(4) if (epoch, row) in dense])
                 for row in range(50)]
    assert choose_samples(store_statistics(store))['hardest'].tolist() == np.argsort(entropies)[:-5:-1].tolist()


@pytest.mark.parametrize('has_labels', [True, False], ids=['labels', 'no labels'])
def test_notes_say_what_a_sample_was_chosen_for(filled_store, labels, monkeypatch, has_labels):
    """Of 120 samples 40 are compared between epochs."""
    monkeypatch.setattr('timm_tinyvit.report.statistics.KEPT_ENTRIES', 4 * 3 * 40)
    data = open_data(filled_store)
    statistics = store_statistics(data.views.store, labels if has_labels else None)
    statistics = replace(statistics, disagreement=np.random.default_rng(0).permutation(40) / 10)
    shown = show_samples(data, statistics, choose_samples(statistics), data.class_names, 1)
    most = np.argsort(-statistics.disagreement)[:4]
    assert [sample.name for sample in shown['disputed']] == [f'sample {row}' for row in statistics.compared[most]]
    assert [sample.note for sample in shown['disputed']] == ['3.90 nats', '3.80 nats', '3.70 nats', '3.60 nats']
    for sample in shown['easiest'] + shown['hardest']:
        position = int(sample.name.removeprefix('sample '))
        share, nats = (values[:, position].mean() for values in (statistics.label_prob, statistics.entropy))
        assert sample.note == (f'{100 * share:.1f}% for the label' if has_labels else f'entropy {nats:.3f} nats')
    assert {sample.note for sample in shown['varied']} == {''}


def run(*flags):
    """Run the program in this process."""
    cli.main(['report', *map(str, flags)])


def refusal(capsys, *flags):
    return programs.refusal(lambda words: run(*words), flags, capsys)


def test_text_and_json_say_the_same(filled_store, labels, capsys):
    run(filled_store, *FIRST)
    text = capsys.readouterr().out
    run(filled_store, *FIRST, '--json')
    found = json.loads(capsys.readouterr().out)
    statistics = found['statistics']
    assert statistics == store_statistics(LogitStore.open(filled_store), labels).summary()
    assert found['manifest'] == json.loads((filled_store / 'store.json').read_text())
    assert found['size']['views'] == 480 and found['size']['bytes'] == found['size']['bytes_when_complete']
    assert found['notes'] == []
    for words in (
            '24 of 24 (up to 20 samples each), 4 of 4 epochs complete', '4 of 4 epochs, 120 of 120 samples, 480 views',
            f'{100 * statistics["accuracy"]:.2f}% top-1 on the views of 4 epochs, ',
            f'{100 * statistics["majority_accuracy"]:.2f}% top-1 with the class that most epochs',
            f'error {100 * statistics["calibration_error"]:.2f}% (15 bins)',
            f'{100 * statistics["label_probability"]:.2f}% on average for the label',
            f'{statistics["entropy"]:.3f} nats on average, {math.log(10):.3f} at most',
            f'top 3 {100 * statistics["mass"]["3"]:.2f}%', f'in {100 * statistics["agreement"]:.2f}% of cases',
            f'of a sample in {100 * statistics["majority"]:.2f}%, ',
            f'{100 * statistics["unanimous"]:.2f}% of the samples',
            f'{statistics["disagreement"]:.3f} nats: mean KL'):
        assert words in text
    table = text.strip().splitlines()[-5:]
    assert table[0].split()[:4] == ['epoch', 'views', 'top-1', 'label']
    for line, part in zip(table[1:], statistics['epochs']):
        shares = [f'{100 * part[name]:.2f}%' for name in ('accuracy', 'label_probability')]
        assert line.split() == [
            str(part['epoch']), '120', *shares, f'{part["entropy"]:.3f}',
            *(f'{100 * part["mass"][size]:.2f}%' for size in '123')]


def test_a_part_of_a_store_is_told_from_the_whole(make_store):
    """Ten of twelve shards: two epochs are complete, and 170 of 200 views are there."""
    store = make_store('most classes')
    size = plain_report(store, None)['size']
    assert (size['shards'], size['all_shards'], size['complete_epochs']) == (10, 12, 2)
    assert (size['views'], size['all_views'], size['bytes']) == (170, 200, store.size())
    assert size['bytes_when_complete'] == round(200 * store.size() / 170)
    statistics = store_statistics(store, np.arange(50) % 7)
    accuracies = sorted(100 * statistics.by_epoch('right'))
    assert figures_of(statistics, store)['teacher accuracy'].endswith(f', {accuracies[0]:.2f} to {accuracies[3]:.2f}')
    assert accuracies[0] < accuracies[3]
    _, *rows = [line.split() for line in text_report(store, statistics).splitlines()[-5:]]
    assert [row[1] for row in rows] == ['50', '40', '50', '30']


def test_an_epoch_that_has_none_of_the_samples_has_no_figures(make_store):
    store = make_store('few classes')
    statistics = store_statistics(store, np.arange(50) % 7, epochs=[0, 3], rows=np.arange(10))
    header, first, second = (line.split() for line in text_report(store, statistics).splitlines()[-3:])
    assert 'classes' not in header and '-' not in first and second == ['3', '0', *['-'] * 6]


def test_the_most_frequent_confusions_are_counted_by_view(make_store, monkeypatch):
    monkeypatch.setattr('timm_tinyvit.report.plots.can_plot', lambda: False)
    store, labels = make_store('few classes'), np.arange(50) % 7
    statistics = store_statistics(store, labels)
    counts = Counter(zip(np.tile(labels, 4).tolist(), statistics.top.ravel().tolist()))
    mistakes = {pair: count for pair, count in counts.items() if pair[1] not in (-1, pair[0])}
    found = confused_pairs(statistics.predictions, 5)
    assert [count for *_, count in found] == sorted(mistakes.values(), reverse=True)[:5]
    assert all(mistakes[label, taken] == count for label, taken, count in found)
    label, taken, count = found[0]
    page = store_page(store, statistics, list('abcdefg'), {}).html()
    assert f'<td>{"abcdefg"[label]}</td><td>{"abcdefg"[taken]}</td><td class=number>{count}</td>' in page


def test_describe_says_what_the_report_says(filled_store, capsys):
    run(filled_store, *FIRST)
    said = capsys.readouterr().out
    cli.main(['store', 'describe', str(filled_store), *FIRST])
    described = capsys.readouterr().out.strip()
    assert described in said and 'top-1 on the views of 4 epochs, ' in described


def test_without_data_nothing_is_said_of_labels(filled_store, tmp_path, capsys):
    run(filled_store, '--json', '--max-samples', '7')
    found = json.loads(capsys.readouterr().out)
    assert found['statistics']['samples'] == 7 and found['statistics']['accuracy'] is None
    assert len(found['notes']) == 1 and found['notes'][0].endswith('give --dataset')
    run(filled_store, '--html', tmp_path / 'page.html', '--epochs', '1:3')
    text = capsys.readouterr().out
    assert 'give --dataset' in text and 'top-1' not in text and '2 of 4 epochs, 120 of 120 samples' in text
    page = check_self_contained((tmp_path / 'page.html').read_text())
    assert not page.all('img') and 'give --dataset' in page.text and len(page.all('svg')) == 7
    assert str(filled_store.parent) not in page.text


def test_the_page_shows_the_replayed_views_with_what_the_teacher_said(filled_store, labels, tmp_path, capsys):
    run(filled_store, *FIRST, '--html', tmp_path / 'page.html', '--max-samples', '30')
    page = check_self_contained((tmp_path / 'page.html').read_text())
    for heading in ('Some samples', 'The easiest samples', 'The hardest samples',
                    'The most disputed samples', 'The most frequent confusions', 'store.json'):
        assert heading in page.text
    data, store = open_data(filled_store), LogitStore.open(filled_store)
    names = teacher_classes(store.manifest, data)
    assert names[0] == 'T-shirt/top'
    views = [image for image in page.all('img') if 'epoch' in image['alt']]
    assert len(views) == 20 * 4
    for image in views[::9]:
        # "sample 17, view of epoch 2"
        words = image['alt'].replace(',', '').split()
        position, epoch = int(words[1]), int(words[-1])
        assert np.array_equal(pixels_of(image['src']), data.views[epoch, position]['view'].numpy())
    # The name stands in the list of contents, too.
    first = page.text.split('The easiest samples')[2]
    position = int(first.partition('sample ')[2].partition(',')[0])
    targets = store.codec.decode(torch.from_numpy(store.read(0, [position])))
    best = names[int(targets.ids[0, 0])]
    assert f'epoch 0\n{best}{100 * math.exp(targets.log_probs[0, 0]):.0f}%\n' in first.partition('epoch 1')[0]


def test_bars_are_the_stored_targets_of_the_view(filled_store, labels):
    data, store = open_data(filled_store), LogitStore.open(filled_store)
    names = teacher_classes(store.manifest, data)
    statistics = store_statistics(store, labels)
    shown = show_samples(data, statistics, {'varied': np.array([7, 90, 31])}, names, 3)['varied']
    assert [sample.name for sample in shown] == ['sample 7', 'sample 90', 'sample 31']
    for sample, position in zip(shown, (7, 90, 31)):
        assert sample.label == names[labels[position]]
        assert [view.caption for view in sample.pictures] == [sample.label, 'epoch 0', 'epoch 1', 'epoch 2']
        for epoch, view in enumerate(sample.pictures[1:]):
            targets = store.codec.decode(torch.from_numpy(store.read(epoch, [position])))
            expected = {names[number]: share for number, share in zip(
                targets.ids[0].tolist(), targets.log_probs[0].exp().tolist())}
            expected.setdefault(names[labels[position]], math.exp(targets.log_rest[0]) / 7)
            *bars, rest = view.bars
            assert {bar.name: bar.share for bar in bars} == pytest.approx(expected, abs=1e-7)
            assert [bar.name for bar in bars if bar.kind == 'label'] == [names[labels[position]]]
            assert rest.kind == 'rest' and sum(bar.share for bar in view.bars) == pytest.approx(1)


def open_data(path, split=SPLIT):
    return labelled_views(LogitStore.open(path), DATA, split)


def test_the_gallery_is_a_picture_of_views(filled_store, tmp_path):
    run(filled_store, *FIRST, '--gallery', tmp_path / 'gallery.png')
    picture = Image.open(tmp_path / 'gallery.png').convert('RGB')
    # Five samples in four epochs, and the images.
    assert picture.width == 10 + 5 * 154 and picture.height > 10 + 5 * (144 + 18 * 4 + 10)
    data, statistics = open_data(filled_store), store_statistics(LogitStore.open(filled_store))
    labels = np.array(load_split(DATA, SPLIT, True)['label'])
    position = choose_samples(store_statistics(LogitStore.open(filled_store), labels))['varied'][0]
    view = data.views[statistics.epochs[2], int(position)]['view'].numpy()
    cell = picture.crop((10 + 3 * 154, 10, 3 * 154 + 154, 154)).resize((32, 32), Image.Resampling.NEAREST)
    assert np.array_equal(np.asarray(cell).transpose(2, 0, 1), view)


def test_bars_are_filled_as_far_as_a_class_is_probable_and_green_for_the_label():
    views = [torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (30, 50, 255)]
    bars = [Bar('', 0.2), Bar('', 1., 'label'), Bar('', 0.5, 'rest')]
    rows = [[Picture(views[0], bars=bars[:2]), Picture(views[1], bars=bars)], [Picture(views[2])]]
    picture = Image.open(io.BytesIO(draw_pictures(rows)))
    assert picture.size == (10 + 2 * 154, 10 + (144 + 18 * 4 + 10) + (144 + 18 + 10))
    for (left, top), value in {(10, 10): 30, (164, 10): 50, (10, 236): 255}.items():
        assert picture.getpixel((left + 72, top + 72)) == (value,) * 3
        # White on white it would have no edge.
        assert picture.getpixel((left, top + 72)) == picture.getpixel((left + 143, top + 72)) == (217, 221, 225)
    for number, (color, end) in enumerate((('#c9def5', 29), ('#bfe5c3', 143), ('#d9dde1', 72))):
        line = [picture.getpixel((164 + x, 10 + 144 + 18 * (1 + number) + 3)) for x in range(144)]
        filled = ImageColor.getrgb(color)
        assert line[:end + 1] == [filled] * (end + 1) and filled not in line[end + 1:]


def test_mixed_views_are_shown_with_what_was_mixed(teacher, tmp_path, capsys):
    split = ['--dataset', DATA, '--train-split', 'train[:20]']
    save_logits.main(list(map(str, [
        *split, '--teacher', teacher, '--logits', tmp_path / 'mixed', '--epochs', '2', '--img-size', '32', '--cutmix',
        '1', '--topk', '3', '--workers', '0', '--quiet'])))
    run(tmp_path / 'mixed', *split, '--html', tmp_path / 'page.html')
    text = capsys.readouterr().out
    assert 'by either label' in text and 'both labels' in text and 'their partners differ' in text
    assert 'samples compared, with other partners in each epoch' in text
    assert re.search('top-1 +both labels +entropy', text)
    page = check_self_contained((tmp_path / 'page.html').read_text())
    data = open_data(tmp_path / 'mixed', 'train[:20]')
    names, data = data.class_names, data.views
    words = page.all('img')[1]['alt'].replace(',', '').split()
    sample = data[int(words[-1]), int(words[1])]
    share = round(100 * sample['lam'])
    assert f'epoch 0: {share}% {names[sample["label"]]}, {100 - share}% {names[sample["label2"]]}' in page.text
    assert np.array_equal(pixels_of(page.all('img')[1]['src']), sample['view'].numpy())
    # What differs between epochs is the partner: nothing is disputed, nor labelled wrongly, for that.
    assert re.search(r', \d+\.\d% for both labels', page.text)
    for words in ('By their mean probability of both labels', 'of both labels', '20 samples, with '
                  'other partners in each epoch', 'in percent. Each epoch mixes a sample with another partner.'):
        assert words in page.text, words
    for words in ('disputed', 'Wrong labels', 'probability of the label', 'of the labelof'):
        assert words not in page.text, words
    assert 'of the label<' not in (tmp_path / 'page.html').read_text()


def test_plots_of_a_store_are_of_one_size(make_store, labels):
    """So that they stand in an even grid."""
    store = make_store('most classes')
    page = store_page(store, store_statistics(store, labels[:50] % 7), list('abcdefg'), {}).html()
    sizes = re.findall(r'<svg width="(\d+)" height="(\d+)"', page)
    assert len(sizes) == 8 and len(set(sizes)) == 1


def test_plots_show_the_statistics(make_store, labels):
    statistics = store_statistics(make_store('most classes'), labels[:50] % 7)
    for figure, _, caption in plots.histogram_plots(statistics):
        assert sum(bar.get_height() for bar in figure.axes[0].patches) == pytest.approx(100)
        assert caption in ('170 views', '50 samples') and figure.axes[0].get_ylabel().startswith('share of ')
    drawn = {}
    for figure, _, _ in plots.store_plots(statistics):
        for line in figure.axes[0].get_lines():
            assert line.get_xdata().tolist() == [0, 1, 2, 3]
            drawn[figure.axes[0].get_ylabel(), line.get_label()] = line.get_ydata()
    for name, label in (('right', 'top-1'), ('label_prob', 'label probability'), ('confidence', 'confidence')):
        found = drawn['accuracy, confidence (%)', label]
        assert np.array_equal(found, 100 * statistics.by_epoch(name)), name
    assert np.array_equal(drawn['mass covered (%)', 'top 6'], 100 * statistics.mass[:, -1])
    figure, = (figure for figure, _, _ in plots.agreement_plot(statistics))
    said = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert said[3, 0] == said[0, 3] == f'{100 * statistics.agreement()[0, 3]:.0f}' and len(said) == 12


def test_one_epoch_is_no_epochs(make_store, labels):
    store = make_store('few classes')
    said = figures_of(store_statistics(store, labels[:50] % 7, epochs=[2]), store)['teacher accuracy']
    assert 'on the views of 1 epoch, ' in said


def test_the_two_sizes_of_a_view_are_told_apart(filled_store):
    """The record alone, and the files that hold records beside their headers."""
    store = LogitStore.open(filled_store)
    facts = store_facts(store)
    assert facts['codec'].endswith(f', records of {store.manifest.record_width} bytes per view')
    per_view = store.size() / 480
    assert facts['size'].endswith(f'; files take {per_view:,.1f} bytes per view, headers included')
    assert per_view > store.manifest.record_width + 0.1


def test_a_shard_is_not_said_to_hold_more_than_there_is(filled_store, tmp_path):
    manifest = replace(LogitStore.open(filled_store).manifest, num_samples=97, shard_size=16384)
    assert store_facts(LogitStore.create(tmp_path / 'small', manifest))['shards'].startswith('0 of 4 (97 samples each)')


def test_facts_of_a_store_say_where_it_begins_and_what_names_its_samples(filled_store, keyed_store):
    store = LogitStore.open(filled_store)
    teacher = store.manifest.teacher | {'input_size': [3, 32, 48]}
    part = LogitStore(filled_store, replace(store.manifest, first_epoch=2, first_sample=1000, teacher=teacher))
    assert store_facts(part)['begins at'] == 'epoch 2, sample 1,000' and 'input 32x48)' in store_facts(part)['teacher']
    assert store_facts(LogitStore.open(keyed_store[1]))['keys'].endswith(' the column name')
    assert not {'begins at', 'keys'} & store_facts(store).keys()


def test_a_keyed_store_is_shown_for_the_part_that_is_at_hand(teacher, fashion, tmp_path, capsys):
    rows = fashion.select(range(40)).add_column('name', [f'no-{number}' for number in range(40)])
    rows.to_parquet(tmp_path / 'all' / 'train.parquet')
    rows.select(range(39, 9, -1)).to_parquet(tmp_path / 'some' / 'train.parquet')
    save_logits.main([
        '--dataset', str(tmp_path / 'all'), '--key', 'name', '--teacher', teacher, '--logits', str(tmp_path / 'logits'),
        '--epochs', '2', '--img-size', '32', '--topk', '3', '--workers', '0', '--quiet'])
    capsys.readouterr()
    run(tmp_path / 'logits', '--dataset', tmp_path / 'some', '--json', '--html', tmp_path / 'page.html')
    found = json.loads(capsys.readouterr().out)['statistics']
    labels = np.array(rows['label'])
    expected = store_statistics(LogitStore.open(tmp_path / 'logits'), labels, np.arange(10, 40)).summary()
    assert found == expected and found['samples'] == 30
    page = check_self_contained((tmp_path / 'page.html').read_text())
    shown = [image for image in page.all('img') if 'view of epoch 1' in image['alt']]
    words = shown[0]['alt'].replace(',', '').split()
    store, replay = open_store(str(tmp_path / 'logits'), {})
    data = SparseLogitDataset(load_split(str(tmp_path / 'all'), None, True), replay, store)
    assert words[0] == 'name'
    assert np.array_equal(pixels_of(shown[0]['src']), data[1, int(words[1].removeprefix('no-'))]['view'].numpy())


def test_other_classes_than_the_teachers_are_not_compared(filled_store, fashion, tmp_path, capsys):
    rows = fashion.select(range(120))
    few = rows.cast_column('label', rows.features['label'].__class__(names=[f'class {n}' for n in range(12)]))
    few.to_parquet(tmp_path / 'train.parquet')
    run(filled_store, '--dataset', tmp_path, '--html', tmp_path / 'page.html', '--max-samples', '5')
    said = capsys.readouterr().out
    assert 'the data have labels of 12 classes, the teacher predicts 10' in said and 'top-1' not in said
    page = check_self_contained((tmp_path / 'page.html').read_text())
    assert page.all('img') and 'entropy' in page.text and not [
        item for item in page.all('li') if item['class'] == 'label']


@pytest.mark.parametrize('labels, names, expected', [
    ([0, 6], None, None), ([-1], None, None), ([0, 7], None, '8'), ([0, 1], list('abcde'), '5'),
    ([0, 1], list('abcdefg'), None)])
def test_labels_are_compared_with_the_classes_of_the_teacher(labels, names, expected):
    """Names say how many classes there are, the largest label only that there are no fewer."""
    found = label_mismatch(np.array(labels), names, 7)
    assert found == (expected and f'the data have labels of {expected} classes, the teacher predicts 7')


def test_classes_are_named_by_the_labels_or_by_the_imagenet_of_the_teacher(filled_store, make_store):
    stored = LogitStore.open(filled_store).manifest
    assert teacher_classes(stored)[9] == 'Ankle boot'
    manifest = replace(stored, class_names=[])
    assert teacher_classes(manifest, open_data(filled_store))[9] == 'Ankle boot'
    assert teacher_classes(manifest) is None
    wide = replace(manifest, num_classes=1000, teacher={'name': 'tiny_vit_21m_224.dist_in22k_ft_in1k'})
    assert teacher_classes(wide)[340] == 'zebra'
    # Another teacher may have 1,000 classes too; and none has the names of labels that are not as many.
    assert teacher_classes(replace(wide, teacher={'name': 'mine'})) is None
    data = open_data(filled_store)
    data.views.store.manifest = wide
    assert data.mismatch and teacher_classes(wide, data)[340] == 'zebra' and data.label_names[9] == 'Ankle boot'


def test_another_machine_shows_no_views_and_says_so(filled_store, tmp_path, capsys):
    shutil.copytree(filled_store, tmp_path / 'logits')
    manifest = json.loads((tmp_path / 'logits' / 'store.json').read_text())
    other = replace(LogitStore.open(filled_store).manifest, probe='0' * 32)
    (tmp_path / 'logits' / 'store.json').write_text(json.dumps(manifest | {'probe': '0' * 32}))
    # The probe is part of what ties shards to a store.
    for epoch in range(4):
        for shard in range(6):
            LogitStore(tmp_path / 'logits', other).write_shard(
                epoch, shard, LogitStore.open(filled_store).read(epoch, range(20 * shard, 20 * shard + 20)))
    run(tmp_path / 'logits', *FIRST, '--html', tmp_path / 'page.html', '--max-samples', '5')
    page = check_self_contained((tmp_path / 'page.html').read_text())
    assert not page.all('img') and 'this machine makes other views' in page.text and 'top-1' in page.text
    said = refusal(capsys, tmp_path / 'logits', *FIRST, '--gallery', tmp_path / 'gallery.png')
    assert 'this machine makes other views' in said and not (tmp_path / 'gallery.png').exists()


def test_without_matplotlib_the_page_has_all_but_plots(filled_store, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    run(filled_store, *FIRST, '--html', tmp_path / 'page.html', '--max-samples', '10')
    page = check_self_contained((tmp_path / 'page.html').read_text())
    assert not page.all('svg') and page.all('img') and "pip install 'timm_tinyvit[plots]'" in page.text


def test_an_empty_store_is_described(filled_store, tmp_path, capsys):
    LogitStore.create(tmp_path / 'empty', LogitStore.open(filled_store).manifest)
    run(tmp_path / 'empty')
    said = capsys.readouterr().out
    assert '0 of 24 (up to 20 samples each), 0 of 4 epochs complete' in said and 'the store is empty' in said
    assert 'nothing on disk yet, about ' in said and 'headers' not in said
    assert 'is empty' in refusal(capsys, tmp_path / 'empty', '--html', tmp_path / 'page.html')
    cli.main(['store', 'describe', str(tmp_path / 'empty'), *FIRST])


def test_bad_input_gets_one_clear_sentence(filled_store, tmp_path, capsys):
    damaged = tmp_path / 'damaged'
    shutil.copytree(filled_store, damaged)
    flip_bit(damaged / 'epoch-00002' / 'shard-00003.arrow')
    cases = [
        ([], 'the following arguments are required: STORE|RUN; see timm-tinyvit report --help'),
        ([tmp_path / 'none'], 'there is no logit store at'),
        ([filled_store, *FIRST[:2], '--train-split', 'train[:119]'], 'this is not the data set'),
        ([filled_store, '--epochs', '3:5'], 'is meant to hold epochs 0:4, but 3:5 are asked for'),
        ([filled_store, '--html', tmp_path], 'cannot be written: it is a folder'),
        ([filled_store, '--gallery', tmp_path / 'gallery.png'], 'give --dataset'),
        ([filled_store, '--gallery', tmp_path], 'cannot be written: it is a folder'),
        ([filled_store, '--max-samples', '0'], '--max-samples is 0'),
        ([damaged], 'shard-00003.arrow is damaged'),
        ([filled_store, '--htlm', 'page.html'], 'unknown argument --htlm; did you mean --html?'),
        (['a', 'b'], 'a and b are two; give one, or put runs side by side with timm-tinyvit compare a b'),
    ]
    for flags, words in cases:
        said = refusal(capsys, *flags)
        assert words in said, said
    with pytest.raises(SystemExit):
        cli.main(['compare', str(tmp_path)])
    assert 'has nothing to be compared with' in capsys.readouterr().err


def test_a_store_on_the_hub_is_reported_as_one_on_disk(hub, hub_children, filled_store, tmp_path, labels):
    files = {file.relative_to(filled_store).as_posix(): file.read_bytes() for file in filled_store.rglob('*.*')}
    hub.add_commit('org/logits', files, repo_type='dataset')
    page = tmp_path / 'page.html'
    url = 'hf://datasets/org/logits'
    ended = hub_children.run(
        hub_programs.run_commands, hub.environment(tmp_path / 'home'),
        ['report', url, *FIRST, '--json', '--epochs', '0:4', '--html', page], ['report', url])
    (status, whole, _), (status_of_brief, brief, _) = json.loads(ended.stdout)
    assert status == status_of_brief == 0
    assert json.loads(whole)['statistics'] == store_statistics(LogitStore.open(filled_store), labels).summary()
    found = check_self_contained(page.read_text())
    assert len(found.all('img')) == 20 * 5 and url in found.text
    # Each epoch is downloaded: without --epochs they are three.
    assert '3 of 4 epochs, 120 of 120 samples, 360 views' in brief and 'on the Hub' in brief


def test_the_folder_of_a_run_is_told_from_a_store(tmp_path, monkeypatch, capsys):
    called = []
    monkeypatch.setattr('timm_tinyvit.report.run.write_run_report', lambda *args: called.append(args) or 'report.html')
    (tmp_path / 'metrics.csv').touch()
    run(tmp_path)
    assert called == [(str(tmp_path), None)] and capsys.readouterr().out == 'report.html\n'
    data = ('--dataset', '--train-split', '--input-key', '--target-key', '--key')
    for flag, *value in (['--json'], ['--gallery', tmp_path / 'x.png'], ['--epochs', '0:1'], ['--max-samples', '9'],
                         *([name, 'x'] for name in data)):
        assert f'is a run; leave out {flag}, which a report on a store takes' in refusal(capsys, tmp_path, flag, *value)
    assert len(called) == 1
