"""The settings in force here, each with the place that its value was taken from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fp16_patch.plan.plan import ENVIRONMENT, MODE_ENV, Origins, Plan, as_given
from fp16_patch.plan.setting import Setting
from fp16_patch.plan.settings import SETTINGS

DEFAULT = "default"


@dataclass(frozen=True)
class SettingInForce:
    """A setting, its value, and where that comes from: `default`, a variable, a file, or a key of a command line."""

    setting: Setting
    value: Any
    origin: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "default": self.setting.default,
            "from": self.origin,
            "help": self.setting.help,
            "values": self.setting.values,
            "applies_to": self.setting.where,
        }


def settings_in_force(plan: Plan, origins: Origins) -> list[SettingInForce]:
    """List every setting, in the table's order."""
    return [
        SettingInForce(setting, getattr(plan, name), origins.get(name, DEFAULT)) for name, setting in SETTINGS.items()
    ]


def misspelled_variables(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield (variable, the one that is read) for those that look like ours and are not: `FP16PATCH`, `fp16_patch`."""
    for name in environ:
        plain = name.upper().replace("_", "").replace("-", "")
        ours = name == MODE_ENV or name.startswith(f"{MODE_ENV}_")
        if plain.startswith(_PLAIN_NAME) and not ours:
            yield name, _VARIABLES.get(plain.removeprefix(_PLAIN_NAME), f"{MODE_ENV}_…")


_PLAIN_NAME = MODE_ENV.replace("_", "")
_VARIABLES = {
    **{name.replace("_", "").upper(): as_given(name, ENVIRONMENT) for name in SETTINGS},
    "": MODE_ENV,
}
