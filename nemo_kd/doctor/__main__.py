"""`python -m nemo_kd.doctor`: the report without the typer and rich of `nemo-kd doctor`."""

from __future__ import annotations

import argparse
import json
import sys

from nemo_kd import doctor


def main(arguments: list[str] | None = None) -> int:
    """Print the report; return exit status 0 for a supported stack, else 1."""
    parser = argparse.ArgumentParser(prog="python -m nemo_kd.doctor", description=doctor.__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    as_json = parser.parse_args(arguments).json
    doctor.announce()
    report = doctor.examine()
    print(json.dumps(report.to_json(), indent=1) if as_json else doctor.as_text(report))
    return 0 if report.supported else 1


if __name__ == "__main__":
    sys.exit(main())
