"""TRL's module of the same name: which wrappers a trainer takes."""

from tether.trl.models import SUPPORTED_ARCHITECTURES

__all__ = ["SUPPORTED_ARCHITECTURES"]
