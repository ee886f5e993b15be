# qpipe: what are compressed language models worth?
#
#   results/tokens/<corpus>/manifest.json       token store, shared by studies          rule tokenize
#   results/<study>/study.yaml, plan.json       the resolved study and its runs         rule plan
#   results/<study>/runs/<run>/record.json      loss of one run, weights beside it      rule train
#   results/<study>/capacity/<format>.json      what theory predicts before training    rule capacity
#   results/<study>/ptq/<job>/ptq.json          a dense run quantized after training        rule ptq
#   results/<study>/losses/<format>.parquet     loss table, one partition per format    rule collect
#   results/<study>/damage/                     what quantization costs, until when it is enough   rule damage
#   results/<study>/fits/<law>.json             fitted laws with intervals              rule fit
#   results/<study>/splits/                     best splits of budgets, finetuned runs  rule splits
#   results/<study>/tables/<law>/               efficiency multipliers                  rule multipliers
#   results/<study>/figures/<law>/              figures                                 rule figures
#   results/<study>/report.html                 everything on one page                  rule report
#
# Run it with: snakemake --profile profiles/local --configfile config/<study>.yaml

from snakemake.utils import min_version

min_version("9.20")


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/runs.smk"
include: "workflow/rules/ptq.smk"
include: "workflow/rules/laws.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/collect.smk"


localrules:
    all,
    plan,
    collect,
    collect_ptq,
    damage,
    capacity,
    fit,
    multipliers,
    figures,
    report,
    splits,
    track,


rule all:
    default_target: True
    input:
        f"{RESULTS}/report.html",
        tracked_laws(),
        expand("{results}/runs/{run}/record.json", results=RESULTS, run=RUNS),
        expand("{results}/ptq/{job}/ptq.json", results=RESULTS, job=STUDY.ptq),
        damage_of_study(),
        splits_of_study(),


onstart:
    slurm.start(workflow)


onsuccess:
    print_tables()
