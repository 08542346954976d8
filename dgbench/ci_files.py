"""Files that let a continuous-integration system run `dgbench ci`: a script, and a workflow of GitHub that calls it."""

from __future__ import annotations

from pathlib import Path

from dgbench import __version__, atomic
from dgbench.errors import DgbenchError

SCRIPT = f"""#!/bin/sh
# Trains and scores dgbench's small benchmark, and compares it with the baseline in dgbench-baseline/.
# Any CI system can call this in a checkout with Python 3.11 or newer.
# Exit status: 0 pass, 1 regression, 2 usage, 3 not comparable.
# Afterwards keep the folder dgbench-ci/: summary.md and comment.md (Markdown), junit.xml (JUnit), comparison.json.
# GitLab:   artifacts: {{when: always, paths: [dgbench-ci], reports: {{junit: dgbench-ci/junit.xml}}}}
# Jenkins:  junit 'dgbench-ci/junit.xml'; archiveArtifacts 'dgbench-ci/*'
# A new baseline: dgbench ci --update-baseline, then commit dgbench-baseline/.
set -eu
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-2}}"
python -m pip install --quiet "dgbench=={__version__}"
dgbench ci --max-drop 1.0 "$@"
"""

WORKFLOW = """name: dgbench
on: [pull_request]
permissions: {contents: read}
jobs:
  benchmark:
    runs-on: ubuntu-latest
    timeout-minutes: 30
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with: {python-version: "3.12"}
      - run: sh dgbench-ci.sh    # the comparison is the step's summary
      - uses: actions/upload-artifact@v4
        if: always()
        with: {name: dgbench-ci, path: dgbench-ci}
"""

FILES = {Path("dgbench-ci.sh"): SCRIPT, Path(".github/workflows/dgbench.yml"): WORKFLOW}


def write(folder: Path) -> list[Path]:
    """Write both files below a folder.

    Raises: DgbenchError if one of them exists with another content; nothing is written then.
    """
    for name, text in FILES.items():
        path = folder / name
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
            raise DgbenchError(f"{path} exists with another content", "remove or rename it, and call `dgbench ci --init` again")
    return [atomic.write(folder / name, text) for name, text in FILES.items()]
