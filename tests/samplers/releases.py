"""Makes packages that look like a release of a sampler to whoever reads its sources and its number."""

from __future__ import annotations

from pathlib import Path

from fp16_patch.samplers.interface import Interface


def make_release(folder: Path, interface: Interface, version: str, without: str | None = None) -> Path:
    """Write a package that has every name that is used of it, but one.

    Returns:
        a folder for the search path.
    """
    package = interface.package
    for use in interface.uses:
        file = folder.joinpath(*use.modules[0].split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        names = [name for name in use.names if name != without]
        written = file.read_text(encoding="utf-8") if file.is_file() else ""
        file.write_text(written + "".join(f"{name!r}\n" for name in names), encoding="utf-8")
    (folder / package / "__init__.py").write_text("", encoding="utf-8")
    metadata = folder / f"{package}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n", encoding="utf-8")
    return folder
