"""How YAML and free-form arguments are read and written: one rule for files and command lines."""

from __future__ import annotations

import re
from typing import Annotated, Any

import yaml
from tyro.constructors import PrimitiveConstructorSpec

from cbsa_torch.train.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are those of Python: 1e-2 is one, 012 is twelve, 1:30 is a string.

    Without dates; true, yes and on are True as in YAML 1.1, and None is null, as on the command line. A key
    that stands twice in a mapping is an error.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, form) for tag, form in known if tag.endswith((":bool", ":null", ":merge"))]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"two keys {key!r}", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes strings that :class:`_Loader`, or any other reader of YAML, would take for something else."""

    yaml_implicit_resolvers = dict(yaml.SafeDumper.yaml_implicit_resolvers)  # noqa: RUF012


_DIGITS = r"\d+(?:_\d+)*"
_POWER = rf"[eE][-+]?{_DIGITS}"
_FORMS = {
    "int": rf"[-+]?{_DIGITS}$",
    "float": rf"[-+]?(?:(?:{_DIGITS}\.(?:{_DIGITS})?|\.{_DIGITS})(?:{_POWER})?|{_DIGITS}{_POWER}"
    r"|(?i:\.?inf|infinity|\.?nan))$",
    "null": r"None$",
}
for _tag, _form in _FORMS.items():
    for _resolver in (_Loader, _Dumper):
        _resolver.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(_form, re.ASCII), list("-+.0123456789inINN")
        )
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def read_yaml(text: str, where: str) -> Any:
    """What a configuration says, or the value of a free-form argument on a command line.

    Args:
        text: YAML.
        where: it was read, for errors.

    Raises:
        ConfigError: it is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: more digits than Python reads
        raise ConfigError(f"{where} is not valid YAML: {error}") from error


def write_yaml(value: Any, **options: Any) -> str:
    """What :func:`read_yaml` reads as ``value``; options of ``yaml.dump``."""
    return yaml.dump(value, Dumper=_Dumper, **options)


def _read_free(words: list[str]) -> dict[str, Any]:
    """Free-form arguments of a command line, names and values in turn."""
    if len(words) % 2:
        raise ConfigError(f"names and values must follow each other (name value name value ...), got {words}")
    return {name: read_yaml(text, name) for name, text in zip(words[::2], words[1::2], strict=True)}


def _write_free(values: dict[str, Any]) -> list[str]:
    """The words that :func:`_read_free` reads, for the help of a command."""
    words = []
    for name, value in values.items():
        text = write_yaml(value, default_flow_style=True, width=float("inf"))
        words += [name, text.removesuffix("\n").removesuffix("\n...")]
    return words


FreeArgs = Annotated[
    dict[str, Any],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME VALUE ...",
        instance_from_str=_read_free,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=_write_free,
    ),
]
"""Arguments of any name: values of Python or of YAML, and on a command line each value as YAML."""
