"""What every section of the configuration is made of: a frozen pydantic model, and the types of its values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = ["Dtype", "Float", "Int", "PathOrUri", "Section", "no_bool"]

Dtype = Literal["auto", "float32", "bfloat16"]
"""A precision; ``auto`` is what pays on the devices at hand."""


def no_bool(value: Any) -> Any:
    """Validates numbers: Python takes true for 1.

    Raises:
        ValueError: for true and false.
    """
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not true or false")
    return value


Int = Annotated[int, BeforeValidator(no_bool)]
"""A whole number; true and false are none."""
Float = Annotated[float, BeforeValidator(no_bool), Field(allow_inf_nan=False)]
"""A finite number; true and false are none."""


def _path(value: Any) -> Any:
    if value == "":
        raise ValueError("the path is empty; was it made of a variable that is not set?")
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~") else value


PathOrUri = Annotated[str, BeforeValidator(_path)]
"""A local path, in which ``~`` is the home directory, or a URI."""


class Section(BaseModel):
    """A section of the configuration. A key that it does not have is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())
