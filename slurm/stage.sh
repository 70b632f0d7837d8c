#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Copy folders to this node's own disk:  stage.sh SOURCE TARGET [SOURCE TARGET ...]
set -euo pipefail

while [ $# -ge 2 ]; do
  mkdir -p "$2"
  cp --recursive --no-target-directory -- "$1" "$2"
  shift 2
done
[ $# = 0 ] || { echo "stage.sh: no target for $1" >&2; exit 2; }
