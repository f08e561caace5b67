"""The store's files: another program reads them from their specification, and no file can harm who reads it."""

import hashlib
import json
import random
import re
import resource
import struct
import zlib
from contextlib import suppress
from itertools import count as count_from
from math import comb
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from timm_tinyvit.base.errors import InputError
from timm_tinyvit.store.arrow import HEADER_SIZE
from timm_tinyvit.store.local import LogitStore
from timm_tinyvit.store.manifest import Manifest
from timm_tinyvit.store.shard import FOOTER_SIZE, MAGIC
from timm_tinyvit.targets.codecs import create_codec, create_feature_codec
from timm_tinyvit.targets.features import FeatureTargets
from timm_tinyvit.targets.sparse import SparseTargets

SPECIFICATION = Path(__file__).resolve().parents[2] / 'docs' / 'format.md'
NUM_SHARD_CASES = 8000
NUM_MANIFEST_CASES = 1000
TEACHER = dict(
    name='resnet50', weights='00ff', mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5], input_size=[3, 224, 224],
    dtype='float32', batch_size=32, device='cpu')


def make_store(path, codec='compact', classes=1000, k=10, seed=0):
    """A store of 2 epochs of 10 samples in 3 shards, and its records by epoch."""
    manifest = Manifest(
        num_samples=10, num_classes=classes, k=k, record_width=create_codec(codec, classes, k).width, epochs=2,
        seed=seed, shard_size=4, codec=codec, teacher=TEACHER, recipe={'vflip': 0.0, 'input_size': [3, 32, 32]},
        dataset={'num_samples': 10, 'hash': '0'})
    store = LogitStore.create(path, manifest)
    records = []
    for epoch in range(2):
        generator = torch.Generator().manual_seed(10 * seed + epoch)
        scale = torch.linspace(1, 8, 10)[:, None]
        logits = scale * torch.randn(10, classes, generator=generator)
        records.append(store.codec.encode(SparseTargets.from_logits(logits, k)))
        for shard in range(3):
            store.write_shard(epoch, shard, records[-1][4 * shard:4 * shard + 4])
    return store, np.stack(records)


def make_feature_store(path, codec='int8', dim=12, grid=2, seed=0):
    """The same of features, and their records by epoch."""
    manifest = Manifest(
        num_samples=10, num_classes=0, k=0, record_width=create_feature_codec(codec, dim, grid).width, epochs=2,
        seed=seed, shard_size=4, codec=codec, teacher=TEACHER, recipe={'vflip': 0.0, 'input_size': [3, 32, 32]},
        dataset={'num_samples': 10, 'hash': '0'},
        features={'dim': dim, 'grid': grid, 'projection': '', 'variance': 1.0})
    store = LogitStore.create(path, manifest)
    records = []
    for epoch in range(2):
        generator = torch.Generator().manual_seed(10 * seed + epoch)
        scale = torch.logspace(-3, 3, 10)[:, None, None]
        vectors = scale * torch.randn(10, max(1, grid ** 2), dim, generator=generator)
        records.append(store.codec.encode(FeatureTargets(vectors)))
        for shard in range(3):
            store.write_shard(epoch, shard, records[-1][4 * shard:4 * shard + 4])
    return store, np.stack(records)


# A reader that knows docs/format.md and nothing of the package


def read_shard(folder, epoch, shard):
    """Records of a shard, through Arrow, and what the shard says of itself."""
    content = (folder / f'epoch-{epoch:05d}' / f'shard-{shard:05d}.arrow').read_bytes()
    assert content[-24:] == b'TTVSHARD' + hashlib.blake2b(content[:-24], digest_size=16).digest()
    table = pa.ipc.open_stream(content).read_all()
    table.validate(full=True)
    return table['record'].to_pylist(), json.loads(table.schema.metadata[b'timm_tinyvit'])


def identity_of(manifest):
    free = ('epochs', 'first_epoch', 'versions', 'class_names')
    fixed = {name: value for name, value in manifest.items() if name not in free}
    fixed['teacher'] = {name: value for name, value in fixed['teacher'].items() if name not in ('name', 'probe')}
    return hashlib.blake2b(json.dumps(fixed, sort_keys=True).encode(), digest_size=16).hexdigest()


def decode_float16(record, num_classes, k):
    """Classes, probabilities and rest mass."""
    ids, log_probs = np.frombuffer(record, '<u2', k), np.frombuffer(record, '<f2', k, 2 * k)
    rest = np.exp(struct.unpack_from('<f', record, 4 * k)[0]) if k < num_classes else 0.
    assert len(record) == 4 * k + 4 * (k < num_classes) + 2
    assert tuple(record[-2:]) == (sum(record[:-2]) % 256, 1 + sum(record[:-2]) % 255)
    return ids, np.exp(log_probs.astype(float)), rest


def class_fields(k, num_classes):
    """l, and the fields `classes` and `low` as (count, bits)."""
    ways = []
    for low in range(17):
        places = k + (num_classes - k) // 2 ** low
        rank = (comb(places, k) - 1).bit_length()
        if k <= 24 and rank <= 62:
            ways.append((rank + k * low, low, 0, (1, rank)))
        ways.append((places + k * low, low, 1, (places, 1)))
    _, low, _, classes = min(ways)
    return low, [classes, (k, low)]


def read_fields(record, fields):
    """The numbers of each field, and what is left: zeros and the check."""
    number, place = int.from_bytes(record, 'little'), 0
    whole = [[0] * count for count, _ in fields]
    for values, (count, bits) in zip(whole, fields):
        for byte in range(bits // 8 if count > 1 else 0):
            for i in range(count):
                values[i] |= record[place] << 8 * byte
                place += 1
    left = number >> 8 * place
    for values, (count, bits) in zip(whole, fields):
        for bit in range(bits // 8 * 8 if count > 1 else 0, bits):
            for i in range(count):
                values[i] |= (left & 1) << bit
                left >>= 1
    assert number % (227 if sum(count * bits for count, bits in fields) <= 218 else 65269) == 0
    return whole


def decode_compact(record, num_classes, k):
    """Classes, probabilities and rest mass."""
    n = 22 if k <= 16 else 45 if k <= 128 else 90
    low_bits, fields = class_fields(k, num_classes)
    range_bits, rest_bits = (4, 7) if k <= 16 else (5, 8)
    fields += [(k // 2, (n * n - 1).bit_length()), (k % 2, (n - 1).bit_length()), (1, range_bits)]
    places, low, levels, odd, (reach,), rest = read_fields(record, [*fields, (int(k < num_classes), rest_bits)])
    if len(places) == 1:
        left, places = places[0], []
        for j in reversed(range(k)):
            places.insert(0, next(p for p in count_from(j) if comb(p + 1, j + 1) > left))
            left -= comb(places[0], j + 1)
    else:
        places = [place for place, one in enumerate(places) if one]
    ids = [(p - j) * 2 ** low_bits + low[j] + j for j, p in enumerate(places)]
    levels = np.array([v for pair in levels for v in (pair % n, pair // n)] + odd)
    u = 1 - (1 - np.exp(-2 ** (4 * reach / (2 ** range_bits - 1)) / 8)) * levels / (n - 1)
    rest_mass = 0.
    if rest:
        top = np.log((num_classes - k) / k)
        rest_mass = 1 / (1 + np.exp((top + 10) * rest[0] / (2 ** rest_bits - 1) - top))
    return ids, (1 - rest_mass) * u ** 8 / (u ** 8).sum(), rest_mass


@pytest.mark.parametrize('codec, classes, k', [
    ('float16', 1000, 10), ('float16', 10, 10), ('compact', 1000, 10), ('compact', 1000, 100), ('compact', 21841, 100),
    ('compact', 50, 7), ('compact', 10, 10), ('compact', 1000, 200), ('compact', 65536, 1), ('compact', 2, 1)])
def test_a_reader_made_from_the_specification_reads_the_same(codec, classes, k, tmp_path):
    store, records = make_store(tmp_path / 'store', codec, classes, k)
    manifest = json.loads((tmp_path / 'store' / 'store.json').read_text())
    assert (manifest['num_classes'], manifest['k'], manifest['codec']) == (classes, k, codec)
    decode = {'float16': decode_float16, 'compact': decode_compact}[codec]
    for epoch in range(2):
        targets = store.codec.decode(torch.from_numpy(store.read(epoch, range(10))), check=True)
        for row in range(10):
            if row % 4 == 0:
                rows, metadata = read_shard(tmp_path / 'store', epoch, row // 4)
                assert metadata == {
                    'format': 'timm_tinyvit.logits', 'store': identity_of(manifest), 'epoch': epoch, 'shard': row // 4}
            ids, probs, rest = decode(rows[row % 4], classes, k)
            assert targets.ids[row].tolist() == list(ids)
            np.testing.assert_allclose(targets.log_probs[row].exp().numpy(), probs, rtol=2e-4, atol=1e-12)
            np.testing.assert_allclose(probs.sum() + rest, 1, atol=2e-3 if codec == 'float16' else 1e-9)
            if k < classes:
                np.testing.assert_allclose(targets.log_rest[row].exp().item(), rest, rtol=1e-4)


@pytest.mark.parametrize('codec', ['int8', 'float16'])
@pytest.mark.parametrize('dim, grid', [(384, 0), (7, 1), (5, 3), (256, 8)])
def test_a_reader_made_from_the_specification_reads_the_same_features(codec, dim, grid, tmp_path):
    store, _ = make_feature_store(tmp_path / 'store', codec, dim, grid)
    manifest = json.loads((tmp_path / 'store' / 'store.json').read_text())
    assert manifest['features'] == {'dim': dim, 'grid': grid, 'projection': '', 'variance': 1.0}
    cells = max(1, grid * grid)
    for epoch in range(2):
        found = store.codec.decode(torch.from_numpy(store.read(epoch, range(10))), check=True).vectors.numpy()
        for row in range(10):
            record = read_shard(tmp_path / 'store', epoch, row // 4)[0][row % 4]
            if codec == 'int8':
                scales = np.frombuffer(record, '<f2', cells).astype(np.float32)
                vectors = scales[:, None] * np.frombuffer(record, 'i1', cells * dim, 2 * cells).reshape(cells, dim)
            else:
                vectors = np.frombuffer(record, '<f2', cells * dim).astype(np.float32).reshape(cells, dim)
            assert record[-5:] == struct.pack('<I', zlib.crc32(record[:-5])) + b'\1'
            np.testing.assert_array_equal(found[row], vectors)


def specified_header(store, epoch, shard):
    """The header of a shard: the bytes in docs/format.md with the shard's numbers in their places."""
    lines = re.findall(r'^ *\d+  ((?:[0-9a-f]{8} ?){8})$', SPECIFICATION.read_text(), re.MULTILINE)
    header, manifest = bytearray.fromhex(''.join(lines)), store.manifest.to_dict()
    text = f'{{"format": "timm_tinyvit.logits", "store": "{identity_of(manifest)}", '
    text += f'"epoch":{epoch:9}, "shard":{shard:9}}}'
    header[236:236 + len(text)] = text.encode()
    rows = min(manifest['shard_size'], manifest['num_samples'] - shard * manifest['shard_size'])
    size = rows * manifest['record_width']
    struct.pack_into('<i', header, 164, manifest['record_width'])
    for place, number in {440: rows, 464: rows, 408: -(-size // 8) * 8, 512: size}.items():
        struct.pack_into('<q', header, place, number)
    return header


@pytest.mark.parametrize('codec', ['float16', 'compact'])
def test_the_bytes_of_a_shard_are_those_that_the_specification_shows(codec, tmp_path):
    store, records = make_store(tmp_path / 'store', codec)
    for epoch, shard in ((0, 0), (1, 2)):
        content, values = store.shard_path(epoch, shard).read_bytes(), read_shard(tmp_path / 'store', epoch, shard)[0]
        body = b''.join(values)
        assert body == records[epoch, 4 * shard:4 * shard + 4].tobytes()
        assert len(content) == 608 + -(-len(body) // 8) * 8
        expected = specified_header(store, epoch, shard) + body + bytes(-len(body) % 8)
        assert content[:-FOOTER_SIZE] == expected + b'\xff' * 4 + bytes(4)


# Files that are damaged, or made to harm


def sealed(content):
    """A shard of these bytes whose checksum is right."""
    return content + MAGIC + hashlib.blake2b(content, digest_size=16).digest()


def damaged(content, chance):
    """These bytes with something wrong in them."""
    content, kind = bytearray(content), chance.randrange(6)
    place = chance.randrange(len(content))
    if kind == 0:
        return bytes(content[:place])
    if kind == 1:
        for _ in range(chance.randint(1, 8)):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif kind == 2:
        size = chance.randint(1, 64)
        content[place:place + size] = chance.choice([bytes(size), b'\xff' * size, chance.randbytes(size)])
    elif kind == 3:
        content[place:place] = chance.randbytes(chance.randint(1, 64))
    elif kind == 4:
        del content[place:place + chance.randint(1, 64)]
    else:
        # A number that is too large, or negative, wherever numbers may be.
        number = chance.choice([-1, 1 << 31, (1 << 31) - 1, 1 << 40, (1 << 63) - 1, -1 << 63])
        at = place // 8 * 8
        content[at:at + 8] = struct.pack('<q', number)[:len(content) - at]
    return bytes(content)


def foreign_streams(records):
    """Arrow streams that pyarrow makes of these records [rows, width], none of them as a store has them."""
    rows, width = records.shape
    values = [record.tobytes() for record in records]
    fixed = pa.array(values, pa.binary(width))
    tables = [
        pa.table({'record': fixed}), pa.table({'record': pa.array(values, pa.binary())}),
        pa.table({'record': pa.array(values, pa.large_binary())}), pa.table({'record': fixed, 'more': fixed}),
        pa.table({'record': pa.array(range(rows))}), pa.table({'record': fixed.dictionary_encode()}),
        pa.table({'record': pa.array([None, *values[1:]], pa.binary(width))}), pa.table({'record': pa.nulls(rows)}),
        pa.table({'record': pa.array(values * 2, pa.binary(width))}), pa.table({'record': fixed[:1]}), pa.table({}),
        pa.table({'record': pa.array([[value] for value in values])})]
    for table in tables:
        for compression in (None, 'lz4', 'zstd'):
            for batch_size in (None, 1):
                sink = pa.BufferOutputStream()
                options = pa.ipc.IpcWriteOptions(compression=compression)
                with pa.ipc.new_stream(sink, table.schema, options=options) as stream:
                    stream.write_table(table, max_chunksize=batch_size)
                yield sink.getvalue().to_pybytes()


def bad_records(content, rows, width, chance):
    """A shard with one bit changed in each of its records."""
    content = bytearray(content)
    for row in range(rows):
        content[HEADER_SIZE + row * width + chance.randrange(width)] ^= 1 << chance.randrange(8)
    return bytes(content)


def outcome(path, expected, epoch, index, check=False):
    """How a reader fares with a store: refused with a sentence, or the right record; all else is an error.

    With `check` a record is looked at by its codec too, as every trainer does.
    """
    try:
        store = LogitStore.open(path)
        store.missing(range(2))
        if index is None:
            for text in store.verify(range(2)):
                raise InputError(text)
            record = np.stack([store.read(epoch, range(10)) for epoch in range(2)])
        else:
            store.check_files([epoch])
            record = store.read(epoch, [index])
        expected = expected if index is None else expected[epoch, [index]]
        try:
            if check:
                store.codec.check(record)
        except ValueError as error:
            raise InputError(str(error))
    except InputError as error:
        text = str(error)
        return 'refused' if 0 < len(text) < 700 and text.isprintable() else f'said {text[:900]!r}'
    except BaseException as error:
        return f'{type(error).__name__}: {str(error)[:300]}'
    return 'right' if record.shape == expected.shape and (record == expected).all() else 'wrong data'


def some_stores(folder, seed=0):
    return [make_store(folder / 'compact', 'compact', seed=seed), make_store(folder / 'float16', 'float16', seed=seed),
            make_feature_store(folder / 'int8', 'int8', seed=seed)]


def attack_shards(folder, num_cases, report):
    """Read shards that are damaged, exchanged or hostile, and say how it went."""
    chance = random.Random(0)
    stores = some_stores(folder)
    others = [store for store, _ in some_stores(folder / 'others', seed=1)]
    files = [file.read_bytes() for store in [*(store for store, _ in stores), *others]
             for file in sorted(store.path.glob('*/*.arrow'))]
    streams = [[list(foreign_streams(records[0, :rows])) for rows in (4, 2)] for _, records in stores]
    for case in range(num_cases):
        number = chance.randrange(len(stores))
        store, records = stores[number]
        epoch, shard = chance.randrange(2), chance.randrange(3)
        path, rows = store.shard_path(epoch, shard), store.manifest.shard_rows(shard)
        content = path.read_bytes()
        body = content[:-FOOTER_SIZE]
        kind = chance.choice(['damaged', 'damaged', 'exchanged', 'foreign', 'header', 'records', 'cut'])
        if kind == 'damaged':
            attack = damaged(content, chance)
        elif kind == 'exchanged':
            attack = chance.choice(files)
        elif kind == 'header':
            attack = sealed(damaged(body[:HEADER_SIZE], chance) + body[HEADER_SIZE:])
        elif kind == 'records':
            attack = sealed(bad_records(body, rows, store.codec.width, chance))
        elif kind == 'cut':
            attack = sealed(body[:chance.randrange(len(body))])
        else:
            attack = sealed(chance.choice(streams[number][shard == 2]))
        path.write_bytes(attack)
        report(
            f'{kind} {case} of {store.manifest.codec}',
            outcome(store.path, records, epoch, 4 * shard + chance.randrange(rows), check=kind == 'records'))
        path.write_bytes(content)


HOSTILE = [
    None, True, -1, 0, 1, 1 << 20, 1 << 31, 1 << 32, 1 << 40, 1 << 62, 1 << 63, -1 << 63, 10 ** 30, 10 ** 4000, 0.5,
    -0.5, 1e308, float('nan'), float('inf'), '', 'a' * 100_000, '/etc/passwd', '../../../etc/passwd', 'C:\\Windows',
    '\ud800', '\0', 'a\nb', '\x1b[2J', '%s%s%n', '{0}', 'float16', 'compact', 'none', [], {}, [[]], [None],
    {'': None}, [0] * 10_000, {str(number): number for number in range(1000)}]
REPEATED_K, ABSURD_K = '"k": 10, "k": 11', ['"k": 1e999', '"k": NaN', '"k": -Infinity', f'"k": {"9" * 5000}']


def hostile_manifest(manifest, chance):
    """The bytes of a manifest in which something is wrong, or absurd."""
    values = {'features': {}} | manifest.to_dict()
    kind, = chance.choices(range(6), weights=(8, 8, 8, 1, 8, 8))
    where = values
    if chance.random() < 0.3:
        where = values[chance.choice(['teacher', 'recipe', 'versions', 'dataset', 'features'])]
    name = chance.choice([*where, 'a new one'])
    value = chance.choice(HOSTILE)
    if kind == 0:
        return damaged(manifest.to_json().encode(), chance)
    if kind == 1:
        where.pop(name, None)
    elif kind == 2:
        for _ in range(chance.choice([5, 20, 2000])):
            value = chance.choice([[value], {'': value}]) if isinstance(value, (list, dict)) else [value]
    elif kind == 3:
        # Numbers that fit each other and ask for much.
        codec = chance.choice(['float16', 'compact'])
        classes, k = chance.choice([1 << 16, 1 << 31]), chance.choice([1, 1000, 65_535])
        with suppress(ValueError):
            values['record_width'] = create_codec(codec, classes, k).width
        values.update(
            num_samples=chance.choice([1 << 20, 1 << 31, 1 << 40]), shard_size=chance.choice([1, 4, 1 << 20, 1 << 32]),
            epochs=chance.choice([1, 2, 100_000]), codec=codec, num_classes=classes, k=k)
    if kind not in (1, 3):
        where[name] = value
    try:
        text = json.dumps(values)
    except RecursionError:
        text = manifest.to_json().replace('"resnet50"', '[' * 100_000 + ']' * 100_000)
    if kind == 4:
        text = text.replace(f'"k": {manifest.k}', chance.choice([REPEATED_K, *ABSURD_K]))
    data = text.encode('utf-8', 'surrogatepass')
    return data.replace(b'resnet50', chance.randbytes(8)) if kind == 5 else data


def attack_manifests(folder, num_cases, report):
    """Open stores with manifests of every kind, and say how it went."""
    chance = random.Random(1)
    stores = some_stores(folder)
    for case in range(num_cases):
        store, records = chance.choice(stores)
        file = store.path / 'store.json'
        content = file.read_bytes()
        file.write_bytes(hostile_manifest(store.manifest, chance))
        report(f'manifest {case} of {store.manifest.codec}', outcome(store.path, records, 0, None))
        file.write_bytes(content)


def run_attack(attack, folder, num_cases, output):
    """Run an attack with little more memory than the process has now; how it went is left in a file."""
    torch.set_num_threads(1)
    counts, bad = {}, []

    def report(case, found):
        counts[found] = counts.get(found, 0) + 1
        if found not in ('refused', 'right'):
            bad.append(f'{case}: {found}')

    size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (300 << 20),) * 2)
    attack(folder, num_cases, report)
    output.write_text(json.dumps([counts, bad[:10]]))


@pytest.mark.parametrize('attack, num_cases, least_refused', [
    (attack_shards, NUM_SHARD_CASES, 0.95), (attack_manifests, NUM_MANIFEST_CASES, 0.6)])
@pytest.mark.launches
def test_no_file_makes_a_reader_crash_take_much_memory_or_read_something_wrong(
        attack, num_cases, least_refused, warm_processes, tmp_path):
    if not Path('/proc/self/statm').exists():
        pytest.skip('this system does not tell the memory of a process')
    output = tmp_path / 'output.json'
    process = warm_processes.Process(target=run_attack, args=(attack, tmp_path, num_cases, output))
    process.start()
    process.join()
    assert process.exitcode == 0
    counts, bad = json.loads(output.read_text())
    assert not bad, '\n'.join(bad)
    assert sum(counts.values()) == num_cases and counts['refused'] > least_refused * num_cases, counts
