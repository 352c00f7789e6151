# Sourced by the other scripts: makes .venv in the project folder once, and again only when
# pyproject.toml has changed. Takes another interpreter from PYTHON, another place from VENV.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV=${VENV:-$ROOT/.venv}
if ! cmp -s "$ROOT/pyproject.toml" "$VENV/pyproject.toml"; then
    PYTHON=${PYTHON:-python3}
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "error: $PYTHON is older than Python 3.10: set PYTHON to a newer one" >&2
        exit 2
    }
    echo "installing into $VENV (once; torch is large) ..."
    "$PYTHON" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
        --editable "$ROOT[train,test,figures]"
    cp "$ROOT/pyproject.toml" "$VENV/pyproject.toml"
fi
PATH="$(cd "$VENV" && pwd)/bin:$PATH"
export PATH
