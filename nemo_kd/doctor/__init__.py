"""What this environment is, what of nemo_kd works in it, and what to do about the rest.

Versions come from package metadata and torch is the only import of weight: NeMo's takes ten
seconds, and a doctor must answer where it fails.
"""

from nemo_kd.doctor.checks import Check
from nemo_kd.doctor.environment import Environment
from nemo_kd.doctor.report import Report, as_text, examine

__all__ = ["Check", "Environment", "Report", "as_text", "examine"]
