"""Examine the environment: what is installed, which parts of nemo_kd work, how to fix the rest.

Versions come from package metadata. Everything else is tried in a separate process, because an
installed package may still fail to import, crash or hang.
"""

from nemo_kd.doctor.checks import Check
from nemo_kd.doctor.environment import Environment
from nemo_kd.doctor.report import Report, announce, as_text, examine

__all__ = ["Check", "Environment", "Report", "announce", "as_text", "examine"]
