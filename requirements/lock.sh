#!/usr/bin/env bash
# Resolve the development environment afresh and write every version to requirements/dev.lock.
# The torch version is kept: change it in the lock by hand, together with a full test run.
set -euo pipefail
cd "$(dirname "$0")/.."

lock=requirements/dev.lock
torch=$(grep -x 'torch==.*' "$lock")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"${PYTHON:-python3}" -m venv "$scratch/venv"
pip=("$scratch/venv/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install -q "$torch" hatchling editables
echo "$torch" >"$scratch/torch.txt"
"${pip[@]}" install -q -c "$scratch/torch.txt" --no-build-isolation -e '.[train,parquet,serve,dev]'

{
    sed -n '/^#/p' "$lock"
    # Versions only: no local build tags, addresses or paths, so that every index can serve them.
    "${pip[@]}" freeze --all --exclude pip --exclude-editable |
        sed -E 's/ @ .*//; s/\+[a-z0-9.]+$//' | grep -E '^[A-Za-z0-9._-]+==' | grep -vE '^(nvidia-|triton==|cuda-)'
} >"$scratch/dev.lock"
grep -qx "$torch" "$scratch/dev.lock" || { echo "error: the scratch environment holds another torch" >&2; exit 1; }
mv "$scratch/dev.lock" "$lock"
echo "$lock: $(grep -c '==' "$lock") packages"
