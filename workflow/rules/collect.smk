"""Targets that people ask for by name: `snakemake ... tokens`, `runs`, `losses`, `fits`, `tables`."""


rule tokens:
    input:
        TOKENS,


rule runs:
    input:
        expand("{results}/runs/{run}/record.json", results=RESULTS, run=RUNS),


rule losses:
    input:
        expand(
            "{results}/losses/{format}.parquet", results=RESULTS, format=STUDY.runs_of
        ),


rule fits:
    input:
        expand("{results}/fits/{law}.json", results=RESULTS, law=LAWS),


rule tables:
    input:
        expand(
            "{results}/tables/{law}/multipliers.md",
            results=RESULTS,
            law=STUDY.tabled_laws,
        ),
