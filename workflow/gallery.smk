"""The gallery of public runs, refitted: no study, no training.

    snakemake -s workflow/gallery.smk --cores 1

INPUTS
    public loss tables that ship with the project
OUTPUTS
    docs/gallery.md     published numbers beside those of the present code
"""

import sys

from qpipe.workflow import source_digest

TABLES = ["quest_losses", "t5_sparse_losses", "quartet_dense_losses"]


rule gallery:
    input:
        script="benchmarks/gallery.py",
        tables=expand("tests/data/{table}.csv", table=TABLES),
    output:
        "docs/gallery.md",
    log:
        "logs/gallery.log",
    params:
        python=sys.executable,
        code=source_digest("laws"),
    message:
        "Refitting public runs"
    shell:
        "{params.python} {input.script} {output} > {log} 2>&1"
