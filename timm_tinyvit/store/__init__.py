"""The sparse targets of every view, in a folder or behind a URL: manifest, shards, readers and the writer.

A store is opened for reading with `open_reader`, wherever it is, or with its views checked by `data.opening`; it is
made and filled as a `LogitStore`. All of them, and several read as one `Ensemble`, are `StoreReader`s.
"""

from .base import StoreReader
from .ensemble import Ensemble
from .local import LogitStore
from .manifest import Manifest
from .remote import RemoteStore, open_reader

__all__ = ['Ensemble', 'LogitStore', 'Manifest', 'RemoteStore', 'StoreReader', 'open_reader']
