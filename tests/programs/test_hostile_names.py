"""A data set whose classes, columns and files have hostile names, through all that shows them."""

import io
import re
import sys
from pathlib import Path

import datasets
import pytest
from PIL import Image

from timm_tinyvit import cli
from support.markdown import inline_markup
from support.pages import check_self_contained
from support.programs import refusal

NAMES = [
    '![x](https://evil.example/p.png)', '<img src=https://evil.example/p.png>', 'a\x1b[2Jb', 'a\u202etxt',
    'a\nb\r| c |', '`code` **b**', '</script><script>x()</script>', 'x' * 200_000, '# a',
    '/home/alice/x hf_abcDEF123456']
UNSEEN = re.compile('[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]')


def check_text(text):
    assert not UNSEEN.search(text.replace('\r\n', '\n')) and 'DEF123456' not in text and len(text) < 500_000


@pytest.mark.launches
def test_names_are_harmless_from_the_data_to_the_card(fashion, teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('HOME', '/home/alice')
    rows = fashion.select(range(32)).cast_column('image', datasets.Image(decode=False))
    folder = tmp_path / 'data'
    folder.mkdir()
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=NAMES)})
    for split in ('train', 'test'):
        datasets.Dataset.from_dict({'image': rows['image'], 'label': rows['label']}, features).to_parquet(
            str(folder / f'{split}.parquet'))
    capsys.readouterr()  # bars
    store, run = tmp_path / 'logits', tmp_path / 'run'
    small = ['--dataset', str(folder), '-j', '0', '--img-size', '32']
    cli.main(['fill', *small, '--teacher', teacher, '--logits', str(store), '--epochs', '1', '--topk', '3'])
    cli.main(['train', *small, '--logits', str(store), '--model', 'test_resnet', '--epochs', '1', '--warmup-epochs',
              '0', '-b', '16', '--output', str(tmp_path), '--experiment', 'run'])
    cli.main(['report', str(store), '--dataset', str(folder), '--html', str(tmp_path / 'store.html'), '--gallery',
              str(tmp_path / 'views.png')])
    cli.main(['store', 'describe', str(store), '--dataset', str(folder)])
    cli.main(['compare', str(run), str(run), '--html', str(tmp_path / 'compared.html')])
    cli.main(['publish', str(run), '--repo', 'org/name', '--dry-run', str(tmp_path / 'card')])
    said = capsys.readouterr()
    check_text(said.out)
    check_text(said.err)
    for page in (run / 'report.html', tmp_path / 'store.html', tmp_path / 'compared.html'):
        text = page.read_text()
        check_self_contained(text)
        check_text(re.sub('base64,[^"]*', '', text))
        assert '/home/alice' not in text
    card = (tmp_path / 'card' / 'README.md').read_text()
    check_text(card)
    classes = next(line for line in card.splitlines() if line.startswith('- **Classes:**'))
    assert inline_markup(classes.removeprefix('- **Classes:**')) == set() and '/home/alice' not in card
    assert 'evil.example' in classes  # the names are there, as text


@pytest.mark.parametrize('name', [name for name in NAMES if '\n' not in name and '/' not in name and len(name) < 200])
def test_a_hostile_name_of_a_column_or_folder_is_harmless_in_a_sentence(name, fashion, tmp_path, capsys):
    folder = tmp_path / name
    folder.mkdir()
    fashion.select(range(4)).select_columns(['label']).rename_column('label', name).to_parquet(
        str(folder / 'train.parquet'))
    said = refusal(cli.main, ['fill', '--dataset', folder, '--teacher', 'x', '--logits', tmp_path / 'l', '--epochs',
                              '1'], capsys)
    check_text(said)


def test_a_file_whose_name_is_no_text_is_told_in_letters(tmp_path, capsys, monkeypatch):
    """As other systems write them; and on a terminal that lacks most letters."""
    for place in ('train/a/1.png', 'train/b/2.png', 'val/a/3.png', 'val/b/4.png'):
        file = tmp_path / place
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8)).save(file)
    Path(str(tmp_path / 'train' / 'a') + '/\udcff\x1b猫.txt').write_bytes(b'')
    for encoding in ('utf-8', 'ascii'):
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, 'stderr', stream)
            with pytest.raises(SystemExit):
                cli.main(['fill', '--dataset', str(tmp_path), '--teacher', 'no_such', '--logits', 'x', '--epochs', '1'])
            stream.flush()
        said = stream.buffer.getvalue().decode(encoding)
        check_text(said)
        assert '\\udcff\\x1b' in said and 'Traceback' not in said
