"""What knows nothing of this project and serves every room: errors, console, atomic files, leases, launch, Hub.

Its face is what the standard library suffices for; console, launch and hub_client bring torch, datasets and the Hub's
client, and are imported by their own names.
"""

from .errors import InputError
from .files import write_atomic
from .leases import Leases, exclusive

__all__ = ['InputError', 'Leases', 'exclusive', 'write_atomic']
