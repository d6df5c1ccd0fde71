"""The installed release, as the declarations know it, and what every release is to give alike.

A test of a defect on stock code asks whether it is there.
"""

from __future__ import annotations

import pytest

from fp16_patch.patching.declarations import Patch, Verdict, declared_patches, installed_release

ORACLE = {"actor": (17.0934, 0.386258), "critic": (1.60356, 0.385302)}
"""By role, of the same two steps under FSDP or FSDP2 on two ranks in any release of verl: the norm of the second step's
gradient, and how far that step took the parameters."""


def verdict_on(name: str) -> Verdict:
    """A declared patch against what is installed."""
    return _patch(name).verify()


def needs(name: str) -> pytest.MarkDecorator:
    """Skip where the installed release does without the patch: it has not the defect that stock is to show."""
    patch = _patch(name)
    exemption = patch.exemption_in(installed_release(patch.package))
    return pytest.mark.skipif(exemption is not None, reason=f"{name}: {exemption}")


def sits_in(name: str, qualname: str) -> pytest.MarkDecorator:
    """Skip where the defect sits in another function than this one."""
    verdict = verdict_on(name)
    elsewhere = verdict.variant.qualname != qualname
    return pytest.mark.skipif(elsewhere, reason=f"{name}: in this release it sits in {verdict.variant.target}")


def _patch(name: str) -> Patch:
    return next(patch for patch in declared_patches() if patch.name == name)
