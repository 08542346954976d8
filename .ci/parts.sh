# What `run` and `nightly` share: a fresh environment, the README's commands as they stand there, and how long each part took.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment"
# shellcheck disable=SC1091
source "$environment/bin/activate"
export PIP_DISABLE_PIP_VERSION_CHECK=1

part() {
  echo "+ $1"
  local begun=$SECONDS status=0
  eval "$1" || status=$?
  took+=("$((SECONDS - begun)) s: $1")
  return $status
}

from_readme() {
  local found
  found=$(grep -m 1 -x -e "$1" README.md) || { echo "README.md lacks its command: $1" >&2; exit 1; }
  echo "$found"
}

durations() {
  printf '%s\n' "${took[@]}" "$SECONDS s: all"
}
