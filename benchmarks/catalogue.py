"""Everything that registers families and providers; import this to have all of them."""

from . import families, providers

__all__ = ["families", "providers"]
