#!/usr/bin/env bash
# Lint, format check, types and the tests. Extra arguments go to pytest:
#   ./scripts/test.sh -m "not slow"                         # under a minute
#   ./scripts/test.sh tests/test_fsq.py -k round_trip
set -euo pipefail
NEEDS="pytest xdist hypothesis ruff basedpyright constriction skimage torch_fidelity tensorboard"
NEEDS+=" setuptools matplotlib"
source "$(dirname "$0")/setup.sh"
cd "$ROOT"
ruff check .
ruff format --check .
basedpyright --pythonpath "$(command -v python)"
# Neighbouring tests, which share a fixture, run in the same process; the first to end takes over.
python -m pytest -n "${TEST_PROCESSES:-2}" --dist worksteal "$@"
