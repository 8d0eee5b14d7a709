# shellcheck shell=bash
# The three lines to change for a cluster. A variable of the same name in the environment wins.

# What NVIDIA's enroot takes: an image of a registry, or a .sqsh file made from ../../Dockerfile.
# Empty: no container, but the checkout's own .venv.
IMAGE=${IMAGE-nvcr.io#nvidia/nemo:25.07}

# Directories of models and data, seen inside at the same place; the checkout is there by itself.
MOUNTS=${MOUNTS-/lustre}

# As in sbatch --account and --partition.
export SBATCH_ACCOUNT=${SBATCH_ACCOUNT-my_account} SBATCH_PARTITION=${SBATCH_PARTITION-batch}
