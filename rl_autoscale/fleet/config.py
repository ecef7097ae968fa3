"""The base of everything a user writes in YAML: frozen, strict, and helpful about typing errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from rl_autoscale.fleet.errors import SpecError, did_you_mean


class Config(BaseModel):
    """A frozen pydantic model that refuses unknown keys and suggests the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            known = {field.alias or name for name, field in cls.model_fields.items()} | set(cls.model_fields)
            for key in data:
                if key not in known:
                    raise ValueError(
                        f"unknown key '{key}' in {cls.__name__}{did_you_mean(str(key), known)}; "
                        f"allowed: {', '.join(sorted(field.alias or name for name, field in cls.model_fields.items()))}"
                    )
        return data

    @classmethod
    def from_dict(cls, data: Any, *, where: str = "") -> Self:
        """Validate plain data.

        Args:
            data: what YAML or JSON parsing gave.
            where: what to call the source in messages, for example a file name.

        Raises:
            SpecError: one line per problem, each naming the key.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise SpecError(describe_validation_error(error, where or cls.__name__)) from None

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        """Read and validate one YAML file; raises SpecError naming the file."""
        return cls.from_dict(read_yaml(path), where=str(path))


def read_yaml(path: Path) -> Any:
    """Parse a YAML file; raises SpecError when it is missing or not YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None


def describe_validation_error(error: ValidationError, where: str) -> str:
    """Turn pydantic's report into ``where: key.path: got X: reason`` lines joined by '; '."""
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        reason = item["msg"].removeprefix("Value error, ")
        got, secret = item["input"], path.rpartition(".")[2].endswith("key")
        secret |= item["type"] == "extra_forbidden"  # it may be a secret under a misspelt name
        shown = f" (got {got!r})" if path and not secret and not isinstance(got, dict | list | BaseModel) else ""
        lines.append(f"{path + ': ' if path else ''}{reason}{shown}")
    return f"{where}: " + "; ".join(lines)
