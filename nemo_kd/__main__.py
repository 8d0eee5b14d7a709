"""`python -m nemo_kd`, for torchrun: `torchrun --nproc_per_node=8 -m nemo_kd train ...`."""

from nemo_kd.cli.main import main

main()
