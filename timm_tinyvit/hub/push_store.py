"""Publishing a store on the Hub, so that one that is published is whole.

Shards go first, in commits of a bounded size, and `store.json` goes last, in one commit with the card, the sample, the
picture and the keys. Everything is verified before it is sent. Stopped at any moment, the same command sends what is
missing; where nothing is, it makes no commit. A store that has grown is published again in the same way: until its last
commit, the repo is the smaller store.
"""

import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from collections.abc import Iterator, Mapping

from ..base.console import info, print_result, progress, warning
from ..base.errors import InputError
from ..base.hub_client import create_repo, push_files
from ..base.leases import Leases
from ..base.remote_folder import RemoteFolder
from ..base.text import counted, readable_bytes
from ..models.names import public_name
from ..report.labels import LabelledViews
from ..store.digests import digests_name
from ..store.keys import FILE_NAME
from ..store.local import LogitStore
from ..store.manifest import MANIFEST_NAME, MAX_MANIFEST_SIZE, Manifest
from ..store.projection import PROJECTION_NAME
from ..store.shard import SHARD_PATH
from ..train.record import PUBLISHED, mark_published
from .model_card import CARD, has_text
from .store_card import (
    PICTURE, SAMPLE, card_statistics, dataset_card, draw_views, parquet_bytes, sample_table, with_license,
)

__all__ = ['PublishedStore', 'check_complete', 'publish_store']

# Of one commit: as many files as the Hub likes, and what can be sent again where a connection breaks.
MAX_FILES = 500
MAX_BYTES = 4 << 30


class PublishedStore:
    """A dataset repo that is to hold a store, as it is on the Hub.

    Args:
        repo_id: ORG/NAME; made where it does not exist.
        private: Whether only its owners see a new one.

    Attributes:
        manifest: What is published there; None where nothing is yet.
        card: Its card, or an empty text.
        files: Bytes of all of its files by their paths.
        revision: The commit that they are of.

    Raises:
        InputError: It holds something else, the token may not write to it, or the Hub cannot be reached.
    """

    def __init__(self, repo_id: str, private: bool | None = None):
        create_repo(repo_id, 'dataset', private)
        self.repo_id = repo_id
        self.manifest: Manifest | None = None
        self.card = ''
        self.files: dict[str, int] = {}
        self.revision = ''
        self.refresh()
        known = (CARD, '.gitattributes', '.gitignore', 'LICENSE')
        foreign = [path for path in self.files if path not in known and not SHARD_PATH.fullmatch(path)]
        if self.manifest is None and (foreign or has_text(self.card)):
            raise InputError(f'the dataset repo {repo_id} holds something else, {(foreign or [CARD])[0]}; give '
                             f'--push-to-hub a new name')

    @property
    def url(self) -> str:
        return f'hf://datasets/{self.repo_id}'

    def refresh(self) -> None:
        """Read what is published now."""
        head = RemoteFolder.resolve(self.url)
        self.revision = head.commit
        self.files = {path: file['size'] for path, file in head.files().items()}
        texts = {name: (head.read(name, MAX_MANIFEST_SIZE) if name in self.files else b'').decode(errors='replace')
                 for name in (MANIFEST_NAME, CARD)}
        self.card = texts[CARD]
        if MANIFEST_NAME in self.files:
            self.manifest = Manifest.from_json(texts[MANIFEST_NAME], f'{self.url}, {MANIFEST_NAME},')

    def joined(self, manifest: Manifest, epochs: range) -> Manifest:
        """The manifest of what is published together with these epochs of a store.

        Raises:
            InputError: Another store is published, or it leaves a gap.
        """
        if self.manifest is None:
            return replace(manifest, first_epoch=epochs.start, epochs=len(epochs))
        differences = self.manifest.differences(manifest)
        if differences:
            raise InputError(f'{self.url} is another store ({"; ".join(differences[:3])}); give '
                             f'--push-to-hub another name')
        stored = self.manifest.stored_epochs
        if epochs.start > stored.stop or epochs.stop < stored.start:
            raise InputError(f'{self.url} has epochs {stored.start}:{stored.stop}, and {epochs.start}:{epochs.stop} '
                             f'would leave a gap; push what is between them too')
        first, stop = min(stored.start, epochs.start), max(stored.stop, epochs.stop)
        return replace(self.manifest, first_epoch=first, epochs=stop - first)

    def size(self, manifest: Manifest, more: Mapping[str, Path] | None = None) -> int:
        """Bytes of all shards of a manifest.

        Args:
            manifest: The manifest.
            more: Shards that are still to be sent, by their paths in the repo.

        Raises:
            InputError: Some are missing.
        """
        sizes = self.files | {path: file.stat().st_size for path, file in (more or {}).items()}
        sizes = {tuple(map(int, match.groups())): size for path, size in sizes.items()
                 if (match := SHARD_PATH.fullmatch(path))}
        wanted = [(epoch, shard) for epoch in manifest.stored_epochs for shard in range(manifest.num_shards)]
        absent = [pair for pair in wanted if pair not in sizes]
        if absent:
            raise InputError(f'{self.url} lacks {len(absent)} shards, the first of epoch {absent[0][0]}: somebody has '
                             f'removed them; push that epoch again from where it is')
        return sum(sizes[pair] for pair in wanted)


def publish_store(
        store: LogitStore,
        published: PublishedStore,
        epochs: range | None = None,
        data: LabelledViews | None = None,
        licence: str | None = None,
) -> None:
    """Bring a store to the Hub, whole.

    Args:
        store: A store in a folder.
        published: Where to.
        epochs: Which epochs of it; all by default.
        data: Its data set, which gives the card accuracy, names and a picture.
        licence: Name of a licence for the card; by default that of the published card.

    Raises:
        InputError: An epoch is not complete, something is damaged, another store is there, or the Hub refuses; what
            was published before is as it was.
    """
    epochs = check_complete(store, epochs)
    with Leases() as leases:
        # From a disk that is read-only it is pushed too.
        with suppress(InputError):
            if _wait_for(leases, store):
                published.refresh()
        manifest = published.joined(_public(store.manifest), epochs)
        problems = list(store.verify(progress(epochs, desc='verify', unit='epoch', leave=False)))
        for problem in problems:
            warning(problem)
        if problems:
            raise InputError(f'{store.path} has {len(problems)} problem(s), one on each line above; nothing was pushed')
        shards = {path.relative_to(store.path).as_posix(): path for epoch in epochs
                  for path in (store.shard_path(epoch, shard) for shard in range(manifest.num_shards))}
        # What cannot be made shows before days of sending.
        files, card = _last_files(store, published, manifest, epochs, shards, data, licence), published.card
        if _push_shards(published, shards):
            published.refresh()
            published.size(manifest)
            if published.card != card:
                files = _last_files(store, published, manifest, epochs, shards, data, licence)
        commit = push_files(
            published.repo_id, files, f'Store of {counted(manifest.epochs, "epoch")}, {manifest.num_samples:,} samples',
            'dataset')
        if commit is None:
            # Somebody else may have pushed all of it since the last refresh.
            published.refresh()
        size = published.size(manifest)
        with suppress(InputError):
            mark_published(store, f'{published.url}@{commit or published.revision}', manifest.stored_epochs)
    where = f'{published.url}: {counted(manifest.epochs, "epoch")}, {readable_bytes(size)}'
    print_result(f'pushed to {where}, commit {commit}' if commit else f'{where}, is there already, nothing was pushed')


def check_complete(store: LogitStore, epochs: range | None) -> range:
    """The epochs to push, all of the store by default.

    Raises:
        InputError: The store is not meant to hold them, or some shards are missing.
    """
    stored = store.manifest.stored_epochs
    chosen = stored if epochs is None else epochs
    if not len(chosen) or chosen.start not in stored or chosen[-1] not in stored:
        raise InputError(f'epochs {chosen.start}:{chosen.stop} are to be pushed, but the store {store.path} has '
                         f'{stored.start}:{stored.stop}; fix --epochs')
    missing = store.missing(chosen)
    if missing:
        complete = missing[0][0]
        raise InputError(
            f'the store {store.path} lacks {len(missing)} shards of epochs {chosen.start}:{chosen.stop}, the first of '
            f'epoch {complete}; fill them'
            + (f', or push what is complete with --epochs {chosen.start}:{complete}' if complete > chosen.start else
               ' first'))
    return chosen


def _wait_for(leases: Leases, store: LogitStore) -> bool:
    """Lease the pushing of a store; whether somebody else was at it until now, or had died over it."""
    has_waited = False
    while not leases.acquire(store.path / PUBLISHED):
        if not has_waited:
            info(f'{store.path} is being pushed by another process; waiting for its end')
            has_waited = True
        time.sleep(1)
    return has_waited


def _public(manifest: Manifest) -> Manifest:
    """A manifest whose teacher has no path of this machine in its name, which is no part of the identity."""
    if 'name' not in manifest.teacher:
        return manifest
    return replace(manifest, teacher={**manifest.teacher, 'name': public_name(manifest.teacher['name'])})


def _push_shards(published: PublishedStore, paths: Mapping[str, Path]) -> bool:
    """Bring shards to the repo; whether there were any to bring."""
    changed = False
    total = sum(path.stat().st_size for path in paths.values())
    with progress(total=total, desc='push', unit='B', unit_scale=True, leave=False) as bar:
        for batch in _batches(paths):
            first, last = (name.partition('/')[0] for name in (batch[0], batch[-1]))
            commit = push_files(
                published.repo_id, {name: paths[name] for name in batch},
                f'Shards of {first}' + (f' to {last}' if last != first else ''), 'dataset')
            changed |= commit is not None
            bar.update(sum(paths[name].stat().st_size for name in batch))
    return changed


def _batches(paths: Mapping[str, Path]) -> Iterator[list[str]]:
    batch, size = [], 0
    for name, path in paths.items():
        batch.append(name)
        size += path.stat().st_size
        if len(batch) == MAX_FILES or size >= MAX_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _last_files(
        store: LogitStore,
        published: PublishedStore,
        manifest: Manifest,
        epochs: range,
        shards: Mapping[str, Path],
        data: LabelledViews | None,
        licence: str | None,
) -> dict[str, bytes | Path]:
    """What the last commit brings: the manifest, and what is made for readers."""
    size = published.size(manifest, shards)
    files: dict[str, bytes | Path] = {MANIFEST_NAME: manifest.to_json().encode()}
    if manifest.key:
        files[FILE_NAME] = store.path / FILE_NAME
    if manifest.features.get('projection'):
        files[PROJECTION_NAME] = store.path / PROJECTION_NAME
    for name in map(digests_name, range(manifest.num_shards)):
        if (store.path / name).is_file():
            files[name] = store.path / name
    # Without the data, what was published with them is not replaced by less.
    if data is not None or published.manifest != manifest or CARD not in published.files:
        sample, statistics = sample_table(store, epochs, data), card_statistics(store, epochs, data)
        files[SAMPLE] = parquet_bytes(sample)
        if data is not None:
            files[PICTURE] = draw_views(data, statistics)
        else:
            missing = 'no new picture' if manifest.features else 'no accuracy and no new picture'
            info(f'the card has {missing}: give --dataset for {"it" if manifest.features else "them"}')
        files[CARD] = dataset_card(
            manifest, published.repo_id, size, sample, statistics, data,
            PICTURE in files or PICTURE in published.files, published.card, licence).encode()
    elif licence:
        files[CARD] = with_license(published.card, licence).encode()
    return files
