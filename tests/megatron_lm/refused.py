"""Print, as JSON, how `pretrain_gpt_kd.py` answers to each of the lists of arguments in argv[1]."""

from __future__ import annotations

import json
import sys

from nemo_kd.errors import NemoKDError
from nemo_kd.mcore import cpu


def main() -> None:
    cpu.install_megatron_lm()
    from nemo_kd.mcore import megatron_lm

    answers = []
    for arguments in json.loads(sys.argv[1]):
        sys.argv[1:] = arguments
        try:
            megatron_lm.check_arguments()
            answers.append("")
        except NemoKDError as error:
            answers.append(str(error))
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
