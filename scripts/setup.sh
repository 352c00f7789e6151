# Sourced by the other scripts. Another environment that is active (venv or conda) and has the
# packages of training (torch 2.6 or newer), and the modules in NEEDS, is used as it is. Otherwise
# makes .venv in the project folder once, and again only when pyproject.toml has changed. Takes
# another interpreter from PYTHON, another place from VENV.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
# shellcheck disable=SC2086  # NEEDS is several words
if [ -z "${VENV:-}" ] && [ -n "$active" ] && [ "$active" != "$ROOT/.venv" ] && python -c '
import sys
from importlib.metadata import version
from importlib.util import find_spec
sys.exit(
    not all(map(find_spec, sys.argv[1:]))
    or [int(part) for part in version("torch").split(".")[:2]] < [2, 6]
)
' torch torchvision lpips numpy tqdm safetensors ${NEEDS:-}; then
    return
fi
VENV=${VENV:-$ROOT/.venv}
is_made() { cmp -s "$ROOT/pyproject.toml" "$VENV/pyproject.toml"; }
if ! is_made; then
    PYTHON=${PYTHON:-python3}
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "error: $PYTHON is older than Python 3.10: set PYTHON to a newer one" >&2
        exit 2
    }
    mkdir -p "$VENV"
    exec 9> "$VENV/lock"  # of several scripts that start at once, one installs and the others wait
    "$PYTHON" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
    if ! is_made; then
        echo "installing into $VENV (once; torch is large) ..."
        "$PYTHON" -m venv "$VENV"
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
            --editable "$ROOT[train,test,figures]"
        cp "$ROOT/pyproject.toml" "$VENV/pyproject.toml"
    fi
    exec 9>&-
fi
PATH="$(cd "$VENV" && pwd)/bin:$PATH"
export PATH
