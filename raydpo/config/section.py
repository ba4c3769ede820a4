"""Base class of the configuration's sections, and types of their values."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = ["Dtype", "Float", "Int", "PathOrUri", "Section", "no_bool"]

Dtype = Literal["auto", "float32", "bfloat16"]
"""A precision. ``auto`` is the faster one on the devices of the run."""


def no_bool(value: Any) -> Any:
    """Refuse true and false where a number is expected: Python takes them for 1 and 0.

    Raises:
        ValueError: for true and false.
    """
    if isinstance(value, bool):
        raise ValueError("expected a number, not true or false")
    return value


Int = Annotated[int, BeforeValidator(no_bool)]
"""A whole number, not true or false."""
Float = Annotated[float, BeforeValidator(no_bool), Field(allow_inf_nan=False)]
"""A finite number, not true or false."""


def _path(value: Any) -> Any:
    if value == "":
        raise ValueError("the path is empty; was it made of a variable that is not set?")
    if isinstance(value, str) and (variable := re.search(r"\$(?:\{\w+\}|[A-Za-z_]\w*)", value)):
        raise ValueError(
            f"{value!r} contains the variable {variable[0]}, which raydpo does not replace; write its "
            "value, or set the key on the command line, where the shell replaces it"
        )
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~") else value


PathOrUri = Annotated[str, BeforeValidator(_path)]
"""A local path, in which ``~`` is the home directory, or a URI."""


class Section(BaseModel):
    """A section of the configuration, frozen. An unknown key is an error."""

    # Built at first use, since building a validator for each section costs more than half of the start of a command.
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), defer_build=True)

    def refuse_idle(self, names: Iterable[str], why: str, prefix: str = "") -> None:
        """Refuse settings of this section that were changed although they have no effect.

        The resolved configuration of a run names every key, so a default value is no mistake.

        Args:
            why: rest of the sentence that begins with the setting and "has no effect".
            prefix: name of the section with a dot, where the message does not name it otherwise.

        Raises:
            ValueError: for the first such setting.
        """
        for name in names:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                told = value.model_dump(exclude_unset=True) if isinstance(value, Section) else value
                told = list(told) if isinstance(told, tuple) else told
                raise ValueError(f"{prefix}{name} {told} has no effect {why}")
