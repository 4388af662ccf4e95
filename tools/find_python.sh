#!/bin/sh
# Prints the first Python >= 3.12 found on PATH or among pyenv's versions; prints nothing if there is none.
fits() { [ -x "$1" ] && "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }

for name in python3.12 python3.13 python3 python; do
    found=$(command -v "$name" 2>/dev/null) || continue
    if fits "$found"; then echo "$found"; exit 0; fi
done
for found in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python3; do
    if fits "$found"; then echo "$found"; exit 0; fi
done
