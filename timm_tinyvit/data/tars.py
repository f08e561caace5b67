"""Tar files of webdataset: samples whose image has another ending than the first one's are read all the same.

What `datasets` passes over without a word is refused: an archive without its end, and members that are links.
"""

import os
import tarfile
from itertools import islice
from typing import Any, BinaryIO
from collections.abc import Iterator

import datasets
import fsspec
import pyarrow as pa
from datasets.features.features import cast_to_python_objects
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from datasets.utils.file_utils import ArchiveIterable

from ..base.errors import InputError
from .folders import check_whole

__all__ = ['TarSamples']


class TarSamples(WebDataset):
    """The webdataset loader of `datasets`, for samples that differ in their endings.

    A sample's one image is in the column of the first sample's, whatever its ending. What another sample has not is
    empty; one without an image is refused.
    """

    @classmethod
    def of(cls, builder: WebDataset) -> 'TarSamples':
        """A builder of the same files."""
        return cls(
            dataset_name=builder.dataset_name, config_id=builder.config_id, hash=f'{builder.hash}-one-image',
            base_path=builder.base_path, token=builder.token, repo_id=builder.repo_id,
            data_files=builder.config.data_files, features=builder.info.features)

    @classmethod
    def _get_pipeline_from_tar(cls, tar_path: str, tar_iterator: ArchiveIterable) -> Iterator[dict[str, Any]]:
        return super()._get_pipeline_from_tar(tar_path, _Members(_Members._iter_from_urlpath, *tar_iterator.args))

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        files = dl_manager.download(self.config.data_files)
        for path in (path for paths in files.values() for path in paths if '://' not in path):
            check_whole(path)
        if not self.info.features:
            path = next(iter(files.values()))[0]
            pipeline = self._get_pipeline_from_tar(path, dl_manager.iter_archive(path))
            samples = list(islice(_in_a_sentence(pipeline, [path]), self.NUM_EXAMPLES_FOR_FEATURES_INFERENCE))
            if not samples:
                raise InputError(f'the tar file {path} holds no samples; expected members as 001.jpg and 001.cls')
            tables = [pa.Table.from_pylist(cast_to_python_objects([sample], only_1d_for_numpy=True))
                      for sample in samples]
            found = datasets.Features.from_arrow_schema(pa.concat_tables(tables, promote_options='default').schema)
            # Of the images of the first sample that has some.
            images = next(filter(None, (list(filter(self._is_image, sample)) for sample in samples)), [])
            self.info.features = datasets.Features({
                name: datasets.Image() if name in images else feature for name, feature in found.items()
                if name in images or not self._is_image(name)})
        return super()._split_generators(dl_manager)

    def _generate_examples(self, tar_paths: list[str], tar_iterators: list[Any]) -> Iterator[tuple[Any, dict]]:
        columns = self.info.features
        images = [name for name, feature in columns.items() if isinstance(feature, datasets.Image)]
        for key, sample in _in_a_sentence(super()._generate_examples(tar_paths, tar_iterators), tar_paths):
            if images and all(sample[name] is None for name in images):
                sample[images[0]] = self._other_image(sample, images[0])
            yield key, {name: sample[name] for name in columns}

    def _other_image(self, sample: dict[str, Any], wanted: str) -> dict[str, Any]:
        """The one image of a sample that has none under the endings of the others."""
        there = [name for name, value in sample.items() if value is not None and not name.startswith('__')]
        images = list(filter(self._is_image, there))
        if len(images) != 1:
            raise InputError(f'the sample {sample["__key__"]} of {sample["__url__"]} has no {wanted}, only '
                             f'{", ".join(there) or "other members"}; every sample needs one image')
        return {'path': f'{sample["__key__"]}.{images[0]}', 'bytes': sample[images[0]]}

    @classmethod
    def _is_image(cls, name: str) -> bool:
        return name.rpartition('.')[2].lower() in cls.IMAGE_EXTENSIONS


class _Members(ArchiveIterable):
    """The files in a tar file, as pairs of a name and an open file."""

    @classmethod
    def _iter_from_urlpath(cls, urlpath: str, download_config: Any = None) -> Iterator[tuple[str, Any]]:
        if '://' not in urlpath or urlpath.startswith(('hf://', 'http')):
            yield from super()._iter_from_urlpath(urlpath, download_config)
            return
        # `datasets` opens all addresses with an argument of those two.
        with fsspec.open(urlpath) as file:
            yield from cls._iter_tar(file)

    @staticmethod
    def _iter_tar(file: BinaryIO) -> Iterator[tuple[str, Any]]:
        key, endings = None, set()
        with tarfile.open(fileobj=file, mode='r|*') as archive:
            for member in archive:
                if member.islnk() or member.issym():
                    raise ValueError(f'its member {member.name} is a link to {member.linkname}; archive the files '
                                     f'themselves, as by tar --dereference --hard-dereference')
                folder, name = os.path.split(member.name)
                if member.isreg() and not name.startswith(('.', '__')):
                    stem, _, ending = name.partition('.')
                    if (folder, stem) != key:
                        key, endings = (folder, stem), set()
                    if ending.lower() in endings:
                        # `datasets` before version 5.2 takes the second.
                        raise ValueError(f'Duplicate member {member.name} of a sample')
                    endings.add(ending.lower())
                    yield member.name, archive.extractfile(member)
                archive.members = []
            # A whole archive ends with blocks of zeros; one that is cut at a header ends for tarfile, too.
            if archive.fileobj.tell() < archive.offset + tarfile.BLOCKSIZE:
                raise ValueError('it is cut short, so that samples are missing')


def _in_a_sentence(samples: Iterator[Any], paths: list[str]) -> Iterator[Any]:
    """The samples; damaged archives, and members that are not what their endings say, raise `InputError`."""
    try:
        yield from samples
    except Exception as error:
        names = f'one of {paths[0]} to {paths[-1]}' if len(paths) > 1 else paths[0]
        raise InputError(f'the tar file {names} cannot be read: {error}; make or copy it again')
