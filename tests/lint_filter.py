"""Read `snakemake --lint` from standard input; fail on everything but the findings that are decisions.

qpipe rules run in the environment that runs Snakemake (one pinned virtual environment), so no rule names a conda
environment or a container. Commands use variables from outside their rule where a parameter would be wrong: parameters
are rerun triggers, and neither the interpreter's path, nor where runs are tracked, nor the study file's name, must ever
train a run again.
"""

import re
import sys

ALLOWED = ("Specify a conda environment or container", "Shell command directly uses variable")

text = sys.stdin.read()
print(text if "Error" in text else "", end="")
findings = re.findall(r"^    \* (.+?):?$", text, flags=re.MULTILINE)
unexpected = [finding for finding in findings if not finding.startswith(ALLOWED)]
for finding in unexpected:
    print(f"snakemake --lint: {finding}")
if not findings:
    print("snakemake --lint: no output was read; expected at least the known findings")
sys.exit(bool(unexpected) or not findings)
