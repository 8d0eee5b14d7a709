"""What this environment is, what of nemo_kd works in it, and what to do about the rest.

Versions come from package metadata. Everything else is tried out, each in a process of its own:
what is there may still not import, not start or never answer.
"""

from nemo_kd.doctor.checks import Check
from nemo_kd.doctor.environment import Environment
from nemo_kd.doctor.report import Report, announce, as_text, examine

__all__ = ["Check", "Environment", "Report", "announce", "as_text", "examine"]
