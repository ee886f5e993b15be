"""Training one run: from `run.yaml` and a token store to a record, weights and curves.

`pretrain` is the whole process in order; the other modules are its parts. Whatever decides the result is a pure
function of the run and the step: the learning rate (`schedule`), the batch (`data`), the random numbers of a step
(`module`). What is left, weights, optimizer moments and running means, is what a checkpoint holds, so that a run
killed anywhere and started again ends with the same record to the last bit on the same CPU.

Only this package imports Lightning.
"""
