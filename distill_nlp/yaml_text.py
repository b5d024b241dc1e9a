"""Safe YAML for settings: no objects, no key given twice, no aliases that explode; every mistake a `YAMLError`."""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_VALUES = 100_000
"""Values in one text with its aliases written out; a few lines of aliases can stand for billions."""


def read_yaml(text: str) -> Any:
    """Parses YAML safely: no objects, no key given twice, `1e-4` a number.

    Raises:
        yaml.YAMLError: it is no YAML, or nothing that settings can be; whatever else a parser or a constructor of
            values raises (recursion, a date that is none, a number of too many digits) becomes one too.

    Example:
        >>> read_yaml("learning_rate: 1e-4")
        {'learning_rate': 0.0001}
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node)
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, TypeError, OverflowError) as error:
        raise yaml.YAMLError(f"a value cannot be read: {error}") from None
    finally:
        loader.dispose()


def _count(root: yaml.Node) -> None:
    """Refuses aliases that hold themselves, and those that multiply beyond `MAX_VALUES`, before any is followed."""
    # Bottom up and without recursion; 0: being counted, so that whoever meets it again stands inside it.
    sizes: dict[int, int] = {}
    stack = [root]
    while stack:
        node = stack[-1]
        below = _below(node)
        if sizes.get(id(node), 0) > 0:
            stack.pop()
        elif id(node) not in sizes:
            sizes[id(node)] = 0
            if any(sizes.get(id(part)) == 0 for part in below):
                raise yaml.composer.ComposerError(None, None, "an alias stands inside itself", node.start_mark)
            stack += [part for part in below if id(part) not in sizes]
        else:
            sizes[id(node)] = 1 + sum(sizes[id(part)] for part in below)
            if sizes[id(node)] > MAX_VALUES:
                problem = f"more than {MAX_VALUES:,} values, each alias counted as what it stands for"
                raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
            stack.pop()


def _below(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, where YAML would quietly take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
            key = key_node.value
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-4 for a string, because it has no point.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
