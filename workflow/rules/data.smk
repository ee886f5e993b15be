"""Corpus to tokens.

REQUIRED INPUTS
    the corpus the study names (read by qpipe itself; its content and the tokenizer name the output, so that studies
    with one corpus share one token store and no time stamp makes it again)
OUTPUTS
    results/tokens/<corpus>/manifest.json and the token shards beside it
"""


rule tokenize:
    output:
        TOKENS,
    log:
        f"logs/tokenize/{STUDY.corpus}.log",
    benchmark:
        f"benchmarks/workflow/tokenize/{STUDY.corpus}.tsv"
    threads: 64
    resources:
        runtime=240,
        mem_mb=4000,
    message:
        "Tokenizing the corpus of study {STUDY.name}"
    shell:
        "{QPIPE} tokenize {STUDY_FILE:q} $(dirname {output}) --workers {threads} 2>&1 | tee {log}"
