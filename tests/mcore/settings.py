"""Print the settings of checkpoints, or the error of each, a line each.

    python tests/mcore/settings.py TOKENIZER CHECKPOINT...

The first two checkpoints lack a tokenizer.
"""

from __future__ import annotations

import sys

from nemo_kd.mcore import cpu

cpu.install()

from nemo_kd.errors import NemoKDError  # noqa: E402
from nemo_kd.mcore.sources import open_model  # noqa: E402

if __name__ == "__main__":
    tokenizer, *paths = sys.argv[1:]
    for number, path in enumerate(paths):
        try:
            settings = open_model(path, tokenizer=tokenizer if number < 2 else None).settings
            print(str(settings).replace("\n", " "))
        except NemoKDError as error:
            print(str(error).replace("\n", " "))
