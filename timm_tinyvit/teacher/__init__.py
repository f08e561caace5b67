"""The teacher's half: run the teacher once on every view, fill stores, and copy, check and estimate them."""

from .check import check_store, verify_store
from .creating import create_store, create_teacher
from .fill import fill_epochs
from .teacher import Teacher

__all__ = ['Teacher', 'check_store', 'create_store', 'create_teacher', 'fill_epochs', 'verify_store']
