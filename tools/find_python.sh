#!/bin/sh
# Prints a Python >= 3.12 that can make a virtual environment: the one given as argument, if it is one, else the first
# found on PATH or among pyenv's versions; prints nothing if there is none. Debian's python3 has `venv` without
# `ensurepip` until python3-venv is installed.
fits() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }

if [ -n "$1" ]; then
    if fits "$1"; then echo "$1"; fi
    exit 0
fi
for name in python3.12 python3.13 python3 python; do
    found=$(command -v "$name" 2>/dev/null) || continue
    if fits "$found"; then echo "$found"; exit 0; fi
done
for found in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python3; do
    if fits "$found"; then echo "$found"; exit 0; fi
done
