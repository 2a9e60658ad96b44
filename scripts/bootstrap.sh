#!/bin/sh
# Makes a virtual environment with Andromeda in it: bootstrap.sh VENV EXTRAS. Asks for nothing but a Python of at least 3.11.
set -eu
venv=$1
extras=${2:-}
root=$(cd "$(dirname "$0")/.." && pwd)

find_python() {
    for python in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
        if command -v "$python" >/dev/null 2>&1 && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "$python"
            return
        fi
    done
    echo "bootstrap: no Python of at least 3.11 was found; install one, or name it: make PYTHON=/path/to/python" >&2
    exit 1
}

make_venv() {
    "$1" -m venv "$venv" >/dev/null 2>&1 && return
    # Debian and Ubuntu ship venv as a package of its own.
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "bootstrap: installing python$version-venv"
        apt-get update -qq && apt-get install -y -qq "python$version-venv" >/dev/null
        rm -rf "$venv"
        "$1" -m venv "$venv" && return
    fi
    echo "bootstrap: Python's venv module is missing; run: sudo apt-get install python$version-venv" >&2
    exit 1
}

python=$(find_python)
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$venv"
    make_venv "$python"
fi
constraints=$root/${CONSTRAINTS:-constraints.txt}
pip="$venv/bin/python -m pip install --quiet --disable-pip-version-check"
# torch comes first and pinned: no later package can then pull in another build. TORCH_INDEX may name an index with CPU-only builds.
$pip ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -c "$constraints" torch
$pip -c "$constraints" -e "$root$extras"
