"""Reading of single images: what is read, how each mode becomes RGB, what is refused, as docs/data.md says."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from support.files import encode_image
from timm_tinyvit.data import decoding
from timm_tinyvit.data.dataset import decode_source
from timm_tinyvit.data.decoding import JpegImage
from timm_tinyvit.data.view_config import ViewConfig
from timm_tinyvit.data.views import Replay, decode_image

RAMP = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (48, 1))


def tiff(values, bits, photometric=1, file_format='<H'):
    """An uncompressed grey TIFF of a row of values, packed as they are given, [W] with so many bits each."""
    if bits == 12:
        text = ''.join(f'{value:012b}' for value in values)
        data = int(text, 2).to_bytes(len(text) // 8, 'big')
    else:
        data = struct.pack(f'{file_format[0]}{len(values)}{file_format[1]}', *values)
    order = file_format[0]
    tags = [(256, len(values)), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8 + 2 + 9 * 12 + 4),
            (277, 1), (278, 1), (279, len(data))]
    head = (b'II' if order == '<' else b'MM') + struct.pack(f'{order}HI', 42, 8) + struct.pack(f'{order}H', len(tags))
    for tag, value in tags:
        wide = tag in (273, 279)
        head += struct.pack(f'{order}HHI', tag, 4 if wide else 3, 1) + (
            struct.pack(f'{order}I', value) if wide else struct.pack(f'{order}HH', value, 0))
    return head + struct.pack(f'{order}I', 0) + data


def tiff_of(data, bits, bands=1, photometric=None, width=1, **others):
    """An uncompressed TIFF of one row, with these bits for each of its bands and more tags by their numbers."""
    tags = {256: [width], 257: [1], 258: [bits] * bands, 259: [1], 262: [2 if bands > 2 else 1], 273: [8],
            277: [bands], 278: [1], 279: [len(data)]}
    tags |= {} if photometric is None else {262: [photometric]}
    tags |= {int(number[1:]): values for number, values in others.items()}
    start = 8 + len(data) + len(data) % 2
    entries, more = b'', b''
    for tag, values in sorted(tags.items()):
        raw = struct.pack(f'<{len(values)}H', *values)
        if len(raw) > 4:
            raw, more = struct.pack('<I', start + 6 + 12 * len(tags) + len(more)), more + raw
        entries += struct.pack('<HHI', tag, 3, len(values)) + raw.ljust(4, b'\0')
    return b'II*\0' + struct.pack('<I', start) + data.ljust(start - 8, b'\0') + struct.pack(
        '<H', len(tags)) + entries + bytes(4) + more


def png_of(row, width, bits, color, *chunks):
    """A PNG of one row of packed pixels."""

    def chunk(name, data):
        return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))

    return b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*item) for item in (
        (b'IHDR', struct.pack('>IIBBBBB', width, 1, bits, color, 0, 0, 0)), *chunks,
        (b'IDAT', zlib.compress(b'\0' + row)), (b'IEND', b'')))


PALETTE = b'PLTE', bytes([200, 30, 60, 1, 2, 3])


def photo(orientation, *entries, size=(48, 32)):
    """A JPEG with a hand-made EXIF block: the orientation, and entries of (tag, type, count, bytes)."""
    base = encode_image(Image.linear_gradient('L').resize(size).convert('RGB'), 'JPEG')
    entries = sorted([(0x112, 3, 1, struct.pack('<H', orientation)), *entries])
    place, body, more = 8 + 2 + 12 * len(entries) + 4, b'', b''
    for tag, kind, count, raw in entries:
        value = raw.ljust(4, b'\0')
        if len(raw) > 4:
            value, more = struct.pack('<I', place + len(more)), more + raw
        body += struct.pack('<HHI', tag, kind, count) + value
    block = b'Exif\0\0II*\0' + struct.pack('<IH', 8, len(entries)) + body + struct.pack('<I', 0) + more
    return base[:2] + b'\xff\xe1' + struct.pack('>H', len(block) + 2) + block + base[2:]


@pytest.mark.parametrize('file_format', ['PNG', 'TIFF', 'PPM', 'JPEG2000'])
def test_16_bit_grey_keeps_its_high_byte_as_16_bit_rgb_does(file_format):
    rgb = np.asarray(decode_image(encode_image(Image.fromarray(RAMP), file_format)))
    assert np.array_equal(rgb, np.repeat((RAMP >> 8).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize('data, expected', [
    (tiff([0, 256, 32768, 65535], 16), [0, 1, 128, 255]),
    (tiff([0, 256, 32768, 65535], 16, file_format='>H'), [0, 1, 128, 255]),
    (tiff([0, 256, 32768, 65535], 16, photometric=0), [255, 254, 127, 0]),
    (tiff([0, 16, 2048, 4095], 12), [0, 1, 128, 255]),
    (b'P5 4 1 1023\n' + struct.pack('>4H', 0, 4, 512, 1023), [0, 1, 128, 255]),
    (b'P2 4 1 65535\n0 256 32768 65535\n', [0, 1, 128, 255]),
    (b'P5 4 1 15\n' + bytes([0, 5, 10, 15]), [0, 85, 170, 255]),
], ids=['TIFF', 'big-endian TIFF', 'TIFF that counts from white', '12 bits', '10 bits', 'text', '4 bits'])
def test_grey_of_any_depth_becomes_8_bits(data, expected):
    assert np.asarray(decode_image(data))[0, :, 1].tolist() == expected


@pytest.mark.parametrize('values, words', [
    (RAMP.astype(np.int32), ('32-bit integers', '8 or 16 bits')),
    (RAMP.astype(np.float32) / 65535, ('real numbers', '8 or 16 bits')),
    ((RAMP.astype(np.int32) - 30000).astype(np.int32), ('32-bit integers',))])
def test_pixels_of_no_known_range_are_refused(values, words, refused):
    with refused('sample 7', *words):
        decode_source({'bytes': encode_image(Image.fromarray(values), 'TIFF'), 'path': None}, 7)


@pytest.mark.parametrize('data, expected', [
    (png_of(struct.pack('>4H', 0xC812, 0xFFFF, 0x1E00, 0), 2, 16, 4), [[200] * 3, [30] * 3]),
    (png_of(struct.pack('>4H', 0xC8FF, 0x1EFF, 0x3CFF, 0), 1, 16, 6), [[200, 30, 60]]),
    (png_of(struct.pack('>3H', 0xC8FF, 0x1EFF, 0x3CFF), 1, 16, 2), [[200, 30, 60]]),
    (png_of(bytes([0b00011011]), 4, 2, 0), [[0] * 3, [85] * 3, [170] * 3, [255] * 3]),
    (png_of(bytes([0xF0]), 8, 1, 3, PALETTE), [[1, 2, 3]] * 4 + [[200, 30, 60]] * 4),
    (png_of(bytes([0, 1]), 2, 8, 3, PALETTE, (b'tRNS', b'\0')), [[200, 30, 60], [1, 2, 3]]),
    (png_of(bytes([200, 30, 60, 1, 2, 3]), 2, 8, 2, (b'tRNS', struct.pack('>3H', 200, 30, 60))),
     [[200, 30, 60], [1, 2, 3]]),
    (png_of(struct.pack('>2H', 0xC812, 0x1E00), 2, 16, 0, (b'tRNS', struct.pack('>H', 0x1E00))), [[200] * 3, [30] * 3]),
    (tiff_of(bytes([0xF0]), 1, photometric=0, width=8), [[0] * 3] * 4 + [[255] * 3] * 4),
    (tiff_of(bytes([0, 64, 255]), 8, photometric=0, width=3), [[255] * 3, [191] * 3, [0] * 3]),
    (tiff_of(bytes([0x5F]), 4, width=2), [[85] * 3, [255] * 3]),
    (tiff_of(struct.pack('<3H', 0xC8FF, 0x1EFF, 0x3CFF), 16, 3), [[200, 30, 60]]),
    (tiff_of(struct.pack('<4H', 0xC8FF, 0x1EFF, 0x3CFF, 9), 16, 4, t338=[2]), [[200, 30, 60]]),
    (tiff_of(bytes([200, 30, 60, 9]), 8, 4, t338=[0]), [[200, 30, 60]]),
    (tiff_of(bytes([100, 15, 30, 128]), 8, 4, t338=[1]), [[199, 29, 59]]),
    (tiff_of(bytes([200, 30, 60]), 8, 3, t284=[2], t273=[8, 9, 10], t279=[1, 1, 1]), [[200, 30, 60]]),
    (b'P6 1 1 1023\n' + struct.pack('>3H', 802, 120, 240), [[200, 30, 60]]),
    (b'P4 8 1\n\xf0', [[0] * 3] * 4 + [[255] * 3] * 4),
], ids=[
    'PNG LA 16', 'PNG RGBA 16', 'PNG RGB 16', 'PNG L 2', 'PNG P 1', 'PNG P with a transparent colour',
    'PNG RGB with a transparent colour', 'PNG L 16 with a transparent grey', 'TIFF 1 from white', 'TIFF L from white',
    'TIFF L 4', 'TIFF RGB 16', 'TIFF RGBA 16', 'TIFF RGBX', 'TIFF RGBa', 'TIFF RGB in planes', 'PPM 10 bits', 'PBM'])
@pytest.mark.parametrize('decoder', ['pillow', 'torch'])
def test_pixels_of_every_layout_have_the_values_that_they_say(data, expected, decoder):
    image = Replay(ViewConfig(decoder=decoder), 0).decode(data)
    pixels = np.asarray(image) if isinstance(image, Image.Image) else image.permute(1, 2, 0).numpy()
    assert pixels[0].tolist() == expected


@pytest.mark.parametrize('file_format', ['JPEG', 'TIFF'])
@pytest.mark.parametrize('options', [dict(mode='CMYK'), dict(mode='RGB', keep_rgb=True)], ids=['CMYK', 'RGB'])
def test_colours_of_photographs_that_are_no_ycc_are_right(file_format, options):
    options = dict(options)
    image = Image.new('RGB', (16, 16), (200, 30, 60)).convert(options.pop('mode'))
    for decoder in ('pillow', 'torch'):
        found = Replay(ViewConfig(decoder=decoder), 0).decode(encode_image(image, file_format, quality=95, **options))
        found = found.pixels if isinstance(found, JpegImage) else found
        pixels = np.asarray(found) if isinstance(found, Image.Image) else found.permute(1, 2, 0).numpy()
        assert np.abs(pixels - np.array([200, 30, 60])).max() <= 3


@pytest.mark.parametrize('data, words', [
    (tiff_of(struct.pack('<4b', -5, 0, 100, 127), 8, width=4, t339=[2]), ('signed integers',)),
    (tiff_of(struct.pack('<4h', -5, 0, 100, 127), 16, width=4, t339=[2]), ('signed integers',)),
    (tiff_of(struct.pack('<2I', 0, 1 << 31), 32, width=2), ('32-bit integers',)),
    (tiff_of(struct.pack('<2d', 0, .5), 64, width=2, t339=[3]), ('begins as a TIFF',)),
    (tiff_of(struct.pack('<3f', 0, .5, 1), 32, 3, t339=[3, 3, 3]), ('begins as a TIFF',)),
    (tiff_of(bytes([1, 2, 3, 4, 5]), 8, 5, photometric=1, t338=[0, 0, 0, 0]), ('begins as a TIFF',)),
    (tiff_of(bytes(5), 10, width=4), ('begins as a TIFF',)),
    (b'Pf\n2 1\n-1.0\n' + struct.pack('<2f', 0, .5), ('real numbers',)),
    (b'\x89PNG\r\n\x1a\n' + bytes(30), ('begins as a PNG',))],
    ids=['8 bits, signed', '16 bits, signed', '32 bits', '64-bit floats', 'floats in colour', '5 bands', '10 bits',
         'PFM', 'a PNG without a header'])
@pytest.mark.parametrize('decoder', ['pillow', 'torch'])
def test_layouts_that_pillow_reads_wrong_or_not_at_all_are_refused_by_what_they_are(data, words, decoder, refused):
    with refused('sample 7', *words):
        decode_source(dict(bytes=data, path=None), 7, Replay(ViewConfig(decoder=decoder), 0).decode)


@pytest.mark.parametrize('file_format', ['GIF', 'WEBP', 'PNG', 'TIFF', 'MPO', 'AVIF'])
def test_of_several_frames_the_first_is_read(file_format):
    frames = [Image.new('RGB', (16, 16), color) for color in ((200, 30, 60), (0, 0, 255))]
    options = dict(quality=95) if file_format in ('WEBP', 'MPO', 'AVIF') else {}
    data = encode_image(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert np.abs(np.asarray(decode_image(data)) - np.array([200, 30, 60])).max() <= 4


@pytest.mark.parametrize('mode, file_format', [
    ('1', 'PNG'), ('L', 'JPEG'), ('P', 'GIF'), ('LA', 'PNG'), ('PA', 'TIFF'), ('RGBA', 'WEBP'), ('CMYK', 'JPEG'),
    ('RGB', 'BMP'), ('RGB', 'AVIF'), ('RGB', 'JPEG2000'), ('RGBA', 'TGA'), ('RGBA', 'ICO'), ('RGB', 'SGI')])
def test_every_other_mode_becomes_rgb_as_pillow_makes_it(mode, file_format):
    picture = Image.linear_gradient('L').resize((32, 32)).convert('RGB' if mode == 'PA' else mode)
    picture = picture.convert('PA') if mode == 'PA' else picture
    data = encode_image(picture, file_format)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert('RGB'))
    assert np.array_equal(np.asarray(decode_image(data)), expected) and expected.std() > 50


def test_transparency_is_dropped_and_leaves_the_colour_below_it():
    image = Image.new('RGBA', (2, 1), (10, 200, 30, 0))
    assert np.asarray(decode_image(encode_image(image, 'PNG'))).tolist() == [[[10, 200, 30]] * 2]


@pytest.mark.parametrize('decoder', ['pillow', 'torch'])
@pytest.mark.parametrize('entries', [
    (), ((0x829a, 10, 1, struct.pack('<ii', -1, 0)),), ((0x9286, 7, 9, b'UNICODE\0\xff'),),
    ((0x8769, 4, 1, struct.pack('<I', 8)),), ((0x131, 2, 1 << 30, struct.pack('<Q', 0)),)],
    ids=['alone', 'a time of -1/0', 'a bad comment', 'a block within itself', 'a text beyond its end'])
def test_a_photo_on_its_side_is_turned_whatever_else_its_exif_block_holds(entries, decoder):
    decode = Replay(ViewConfig(input_size=(3, 32, 32), decoder=decoder), 0).decode
    for orientation, expected in ((6, (32, 48)), (1, (48, 32)), (0, (48, 32)), (9, (48, 32))):
        image = decode(photo(orientation, *entries))
        size = tuple(image.shape[:0:-1]) if isinstance(image, torch.Tensor) else image.size
        assert size == expected, orientation


def test_an_exif_block_that_cannot_be_read_says_nothing():
    data = photo(6).replace(b'II*\0', b'??*\0', 1)
    assert decode_image(data).size == (48, 32)


def test_a_file_that_would_start_a_program_is_refused(tmp_path, monkeypatch, refused):
    marker, program = tmp_path / 'started', tmp_path / 'gs'
    program.write_text(f'#!/bin/sh\ntouch {marker}\n')
    program.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    eps = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n'
    for decoder in ('pillow', 'torch'):
        with refused('sample 3', 'no image of a kind that is read', 'JPEG, PNG'):
            decode_source(dict(bytes=eps, path=None), 3, Replay(ViewConfig(decoder=decoder), 0).decode)
    assert not marker.exists()


@pytest.mark.parametrize('data', [
    b'SIMPLE  =                    T'.ljust(2880), b'%!PS', b'\xd7\xcd\xc6\x9a' + bytes(40), b'<svg/>', b'\0' * 64],
    ids=['FITS', 'PostScript', 'WMF', 'SVG', 'zeros'])
def test_other_kinds_are_refused_by_the_names_of_those_that_are_read(data, refused):
    with refused('no image of a kind that is read'):
        decode_source(dict(bytes=data, path=None), 0)


def png_with_text(length):
    def chunk(name, data):
        return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))

    data = encode_image(Image.new('RGB', (4, 4), (9, 8, 7)), 'PNG')
    end = data.rindex(b'IEND') - 4
    return data[:end] + chunk(b'zTXt', b'Comment\0\0' + zlib.compress(b'x' * length)) + data[end:]


def test_text_of_some_megabytes_in_a_png_does_not_matter_and_a_bomb_of_it_is_refused(refused):
    assert decode_image(png_with_text(2 << 20)).getpixel((0, 0)) == (9, 8, 7)
    with refused('sample 0', 'too large'):
        decode_source(dict(bytes=png_with_text(65 << 20), path=None), 0)


def test_images_of_more_than_179_megapixels_can_be_allowed(monkeypatch, refused):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', Image.MAX_IMAGE_PIXELS)
    data = encode_image(Image.new('1', (20_000, 9_000)), 'PNG')
    with refused('sample 0', '180000000 pixels', decoding.MAX_PIXELS):
        decode_source(dict(bytes=data, path=None), 0)
    monkeypatch.setenv(decoding.MAX_PIXELS, '200000000')
    assert decoding.identify(data).size == (20_000, 9_000)
    monkeypatch.setenv(decoding.MAX_PIXELS, 'many')
    with refused('sample 0', decoding.MAX_PIXELS, 'many', 'a number'):
        decode_source(dict(bytes=data, path=None), 0)


@pytest.mark.parametrize('decoder', ['pillow', 'torch'])
@pytest.mark.parametrize('size', [(1, 1), (2, 1), (1, 2), (2, 2), (1, 900)])
def test_a_view_of_one_or_two_pixels_is_a_view_of_them(size, decoder):
    replay = Replay(ViewConfig(input_size=(3, 16, 16), decoder=decoder, color_jitter=0.), 1)
    image = replay.decode(encode_image(Image.new('RGB', size, (200, 30, 60)), 'PNG'))
    for view in replay.views([image] * 200, [(0, index) for index in range(200)]):
        assert view.shape == (3, 16, 16) and (view == torch.tensor([200, 30, 60])[:, None, None]).all()


def test_the_endings_of_files_are_those_that_pillow_knows_of_the_kinds_that_are_read():
    endings = decoding.image_endings()
    assert {'.jpg', '.jpeg', '.png', '.webp', '.avif', '.tif', '.mpo'} < endings
    assert not endings & {'.eps', '.ps', '.wmf', '.fits', '.h5', '.mpg', '.txt'}
