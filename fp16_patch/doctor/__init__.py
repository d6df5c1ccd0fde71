"""Whether this machine, and a command line, are fit for the plan."""

from fp16_patch.doctor.examination import Examination, configured_settings, examine

__all__ = ["Examination", "configured_settings", "examine"]
