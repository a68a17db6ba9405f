"""Fewer of a test's cases where each takes long: values of its parameters have their turns, not all of their combinations."""

import itertools
import zlib
from collections.abc import Iterable, Iterator

import pytest


def parameters(item: pytest.Item) -> dict[str, object]:
    return dict(item.callspec.params) if hasattr(item, "callspec") else {}


def in_turn(items: Iterable[pytest.Item], together: int = 1) -> Iterator[pytest.Item]:
    """Cases that bring some value, or with ``together`` 2 some pair of values, which their test has not had yet, in an order that mixes
    the others."""
    had: dict[str, set[object]] = {}
    for item in sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode())):
        values = [(name, str(value)) for name, value in sorted(parameters(item).items())]
        brought = set(itertools.combinations(values, min(together, len(values))))
        of_test = had.setdefault(item.nodeid.split("[")[0], set())
        if not values or not brought <= of_test:
            yield item
        of_test |= brought
