"""Pages: read back with an HTML parser, and looked at by a real browser where there is one."""

import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from support.pages import Reader, check_self_contained, pixels_of
from timm_tinyvit.base.errors import InputError
from timm_tinyvit.report.page import Bar, Page, Picture

NASTY = '<script>alert("x")</script> & \'coat\''


def curve(color='tab:blue'):
    figure = Figure(figsize=(4, 3), layout='constrained')
    axes = figure.subplots()
    axes.plot([1, 2, 3], marker='o', color=color, label='<a & b>')
    axes.set(xlabel='epoch')
    axes.legend()
    return figure


def view(height=28, width=28):
    return np.random.default_rng(0).integers(256, size=(3, height, width), dtype=np.uint8)


@pytest.fixture
def page():
    """A page with everything on it, and nasty text everywhere."""
    page = Page(NASTY, NASTY)
    for part in ('one', 'two', NASTY):
        page.heading(part)
    page.heading(NASTY, level=3)
    page.paragraph(NASTY)
    page.warning(NASTY)
    page.facts({NASTY: NASTY, 'epochs': 3})
    page.table(['class', 'views', NASTY], [[NASTY, 3, '81.2%'], ['b', 4, '-']], caption=NASTY)
    page.figure(curve(), NASTY, NASTY)
    page.figure(curve(), 'again')
    page.pictures([Picture(view(), NASTY, [Bar(NASTY, 0.25, 'label'), Bar('b', 0.75)])], NASTY)
    page.details(NASTY, NASTY)
    return page.html()


def test_no_text_becomes_markup_and_nothing_is_loaded(page):
    found = check_self_contained(page)
    assert found.text.count(NASTY) == 19  # twice for the title, once for each other text
    assert [attributes['alt'] for attributes in found.all('img')] == [NASTY]
    assert [attributes['aria-label'] for attributes in found.all('svg')] == [NASTY, 'again']
    assert NASTY in [attributes.get('title') for attributes in found.all('li')]


def test_headings_make_a_list_of_contents_from_three_on(page):
    found = Reader(page)
    assert [link['href'] for link in found.all('a')] == ['#part-0', '#part-1', '#part-2']
    short = Page('short')
    short.heading('one')
    assert not Reader(short.html()).all('nav')


def test_columns_of_numbers_stand_to_the_right():
    page = Page('numbers')
    page.table(['name', 'count', 'share', 'size', 'mixed', 'sign'], [
        ['a', 3, '81.2%', '2.1 MB', '7', '+0.5'], ['b', 1_000, '-', '', '7 of 9', '−1']])
    cells = [attributes.get('class') for attributes in Reader(page.html()).all('td')]
    assert cells == [None, 'number', 'number', 'number', None, 'number'] * 2


def test_a_figure_takes_the_colours_of_the_page():
    page = Page('plot')
    page.figure(curve('#123456'), 'a curve')
    page = page.html()
    svg = page[page.index('<svg'):page.index('</svg>')]
    assert 'currentColor' in svg and '#123456' in svg and '#000000' not in svg and '#ffffff' not in svg
    assert 'epoch</text>' in svg and '&lt;a &amp; b&gt;</text>' in svg
    assert 'viewBox="0 0 288 216"' in svg and 'metadata' not in svg


def test_a_figure_of_very_many_marks_becomes_pixels():
    points = np.random.default_rng(0).random((2, 20_000))
    figure = Figure(figsize=(4, 3))
    figure.subplots().plot(*points, '.')
    page = Page('cloud')
    page.figure(figure, NASTY)
    found, = check_self_contained(page.html()).all('img')
    assert found['src'].startswith('data:image/png') and found['alt'] == NASTY and len(page.html()) < 1_000_000


@pytest.mark.parametrize('kind', ['array', 'tensor'])
def test_small_pictures_are_the_very_pixels_enlarged(kind):
    pixels = view()
    page = Page('picture')
    page.pictures([Picture(pixels if kind == 'array' else torch.from_numpy(pixels))], width=100)
    found, = Reader(page.html()).all('img')
    assert found['class'] == 'small' and np.array_equal(pixels_of(found['src']), pixels)
    assert 'pixelated' in page.html()


def test_large_pictures_are_photographs():
    page = Page('picture')
    page.pictures([Picture(view(300, 200))])
    found, = Reader(page.html()).all('img')
    assert 'class' not in found and found['src'].startswith('data:image/jpeg')
    assert pixels_of(found['src']).shape == (3, 300, 200)


@pytest.mark.parametrize('share, expected', [
    (0, '0%'), (0.0004, '<0.1%'), (0.006, '0.6%'), (0.43, '43%'), (0.995, '99.5%'), (0.99999, '>99.9%'), (1, '100%')])
def test_probabilities_are_told_from_none_and_from_all(share, expected):
    page = Page('bars')
    page.pictures([Picture(view(), bars=[Bar('coat', share)])])
    assert f'\ncoat{expected}\n' in Reader(page.html()).text


def test_a_page_is_written_whole_or_refused(page, tmp_path, one_sentence):
    small = Page('small')
    small.write(tmp_path / 'new' / 'page.html')
    assert (tmp_path / 'new' / 'page.html').read_text() == small.html()
    with pytest.raises(InputError) as caught:
        small.write(tmp_path / 'new')
    one_sentence(str(caught.value), 'cannot write')
    assert [path.name for path in tmp_path.iterdir()] == ['new']


@pytest.mark.skipif(not shutil.which('chromium'), reason='needs chromium')
@pytest.mark.parametrize('width', [500, 1200])
def test_a_browser_shows_all_of_it_at_any_width(page, tmp_path, width):
    # The page has no script; the test has one, which says what the browser made of it.
    probe = ('<script>document.title = [document.documentElement.scrollWidth <= innerWidth, '
             'document.images[0].naturalWidth, document.querySelectorAll("svg path").length > 10, '
             'getComputedStyle(document.querySelector("svg text")).fontFamily == '
             'getComputedStyle(document.body).fontFamily].join(" ")</script>')
    (tmp_path / 'page.html').write_text(page.replace('</body>', probe + '</body>'))
    shown = subprocess.run(
        ['chromium', '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={tmp_path}/profile',
         f'--window-size={width},2000', '--dump-dom', (tmp_path / 'page.html').as_uri()],
        capture_output=True, text=True, timeout=300)
    assert '<title>true 28 true true</title>' in shown.stdout, shown.stderr[-2000:]


def test_on_a_phone_headings_may_wrap():
    wide, _, narrow = Page('phone').html().partition('@media (max-width: 600px)')
    assert re.search(r'\.facts th { [^}]*white-space: nowrap', wide)
    assert '.facts th, th.number { white-space: normal; }' in narrow.partition('@media')[0]


@pytest.mark.skipif(not shutil.which('chromium'), reason='needs chromium')
def test_a_browser_keeps_figures_in_sight_on_a_phone_and_plots_side_by_side(tmp_path):
    """In frames of 400 and 1200 pixels: the whole table is in sight, and a long caption does not widen its plot."""
    page = Page('run')
    page.facts({'a heading of quite some words of the averaged weights': '81.60%, top-5 99.50%, loss 0.4938'})
    page.figure(curve(), 'one', 'a caption that is far longer than its plot is wide ' * 3)
    page.figure(curve(), 'two')
    (tmp_path / 'page.html').write_text(page.html())
    (tmp_path / 'frames.html').write_text(
        '<iframe src="page.html" width="400" height="900"></iframe><iframe src="page.html" width="1200" height="900">'
        '</iframe><script>onload = () => { const [phone, desk] = [...document.querySelectorAll("iframe")].map('
        'frame => frame.contentDocument); const box = phone.querySelector(".scroll"); const [one, two] = '
        '[...desk.querySelectorAll("figure")].map(figure => figure.getBoundingClientRect().top); '
        'document.title = [box.scrollWidth <= box.clientWidth, one == two].join(" ") }</script>')
    shown = subprocess.run(
        ['chromium', '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={tmp_path}/profile',
         '--allow-file-access-from-files', '--window-size=1700,1000', '--virtual-time-budget=5000', '--dump-dom',
         (tmp_path / 'frames.html').as_uri()], capture_output=True, text=True, timeout=300)
    assert '<title>true true</title>' in shown.stdout, shown.stdout[:500] + shown.stderr[-2000:]
