# shellcheck shell=bash
# The three lines to change for a cluster. Environment variables of the same names override them.

# Image for NVIDIA's enroot: from a registry, or a .sqsh file built from ../../Dockerfile.
# Empty: no container; the checkout's own .venv.
IMAGE=${IMAGE-nvcr.io#nvidia/nemo:25.07}

# Directories of models and data, mounted at the same path; the checkout is always mounted.
MOUNTS=${MOUNTS-/lustre}

# Values of sbatch's --account and --partition. submit.sh reads them; for sbatch itself, which does
# not, `source examples/slurm/settings.sh` first.
export SBATCH_ACCOUNT=${SBATCH_ACCOUNT-my_account} SBATCH_PARTITION=${SBATCH_PARTITION-batch}
