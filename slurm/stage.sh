#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Copy folders to this node's own disk:  stage.sh SOURCE TARGET [SOURCE TARGET ...]
set -euo pipefail

while [ $# -ge 2 ]; do
  # Whole or not at all, and by whoever comes first: the "own" disk may be one that nodes share.
  if [ ! -d "$2" ]; then
    mkdir -p -- "$(dirname -- "$2")"
    part=$(mktemp --directory -- "$2.partial-XXXXXX")
    cp --recursive --no-target-directory -- "$1" "$part"
    chmod --reference="$1" -- "$part" # mktemp's is for its owner alone
    mv --no-target-directory -- "$part" "$2" 2>/dev/null || { [ -d "$2" ] && rm -rf -- "$part"; }
  fi
  shift 2
done
[ $# = 0 ] || { echo "stage.sh: no target for $1" >&2; exit 2; }
