"""Makes packages that look like a release of vLLM to whoever reads its sources and its number."""

from __future__ import annotations

from pathlib import Path

from fp16_patch.vllm.interface import uses


def make_release(folder: Path, version: str, without: str | None = None) -> Path:
    """Write a vLLM that has every name that is used of it, but one.

    Returns:
        a folder for the search path.
    """
    for use in uses():
        file = folder.joinpath(*use.modules[0].split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        names = [name for name in use.names if name != without]
        written = file.read_text(encoding="utf-8") if file.is_file() else ""
        file.write_text(written + "".join(f"{name!r}\n" for name in names), encoding="utf-8")
    (folder / "vllm" / "__init__.py").write_text("", encoding="utf-8")
    metadata = folder / f"vllm-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8")
    return folder
