"""Arrays by name, as tests like them, laid out as operations take them."""

from jaxkv.kernels.cache import Nodes, Slots, Token


def packed(arrays, **others):
    """Return the arguments by name: a token (or a tree's nodes), slots, and the rest.

    Args:
      arrays: `key`, `value` and `position` of a token or of nodes; the fields of
        `Slots`; and any others.
      **others: more of them.
    """
    left = dict(arrays, **others)
    new = Token if left["key"].ndim == 3 else Nodes
    token = new(*(left.pop(name) for name in new._fields))
    slots = Slots(**{name: left.pop(name) for name in Slots._fields if name in left})
    return left | {new.__name__.lower(): token, "slots": slots}
