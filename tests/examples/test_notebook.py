"""The notebook, at toy size, in a kernel of its own."""

import pytest

from support.flags import ROOT

nbclient, nbformat = pytest.importorskip('nbclient'), pytest.importorskip('nbformat')

SMALL = {'train[:500]': 'train[:40]', 'test[:500]': 'test[:40]', 'EPOCHS = 10': 'EPOCHS = 3', '=50': '=20'}


@pytest.mark.launches
def test_the_notebook_fills_a_store_shows_its_views_and_trains(tmp_path, monkeypatch):
    text = (ROOT / 'examples' / 'distill.ipynb').read_text()
    assert len(text) < 200_000
    for large, small in SMALL.items():
        assert large in text
        text = text.replace(large, small)
    notebook = nbformat.reads(text, as_version=4)
    folder = tmp_path / 'examples'
    folder.mkdir()
    (folder / 'fashion_mnist').symlink_to(ROOT / 'examples' / 'fashion_mnist')
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    nbclient.NotebookClient(notebook, timeout=300, resources={'metadata': {'path': str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
    shown = [kind for output in outputs for kind in output.get('data', {})]
    # Pictures of views and the plot of the run; bars, of the filling at least, are widgets.
    assert shown.count('image/png') == 2 and 'application/vnd.jupyter.widget-view+json' in shown
    said = ''.join(output.get('text', '') for output in outputs)
    assert 'finished: ' in said and said.index('teacher: ') < said.index('student: ')
    assert (tmp_path / 'runs' / 'notebook' / 'student' / 'report.html').is_file()
    assert 'epochs 0 to 2 of 40 samples' in str(outputs)
