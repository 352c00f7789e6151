#!/usr/bin/env bash
# Lint, format check and the whole test suite. Extra arguments go to pytest:
#   ./scripts/test.sh tests/test_fsq.py -k round_trip
set -euo pipefail
source "$(dirname "$0")/setup.sh"
cd "$ROOT"
ruff check .
ruff format --check .
python -m pytest -n "${TEST_PROCESSES:-2}" "$@"
