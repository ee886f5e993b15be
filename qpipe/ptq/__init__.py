"""Post-training quantization of dense checkpoints to any average number of bits per weight.

A method is a composition of parts, each a module here, never a class of its own:

    groups        which weights share a depth, a scale and an offset (rows x columns, rows clustered or not)
    codebooks     the levels of a depth: companders, uniform, Lloyd-Max; their distortion D(B)
    fitting       scale and offset of a group by search, and what each depth would cost it
    sensitivity   gradient second moments: what an error in a weight costs at the output (probes)
    allocation    depths of all groups under one budget of bits (Lagrangian on the measured table, closed form, exact)
    feedback      error feedback over columns (GPTQ)
    linearity     per-layer error weights by the linearity theorem (HIGGS)

`qpipe.ptq_methods` names the compositions (`cvxq`, `rtn`, `gptq`, `higgs`), `network` presents our decoders and
Hugging Face models alike, `streaming` goes through a network block by block, `packed` is the file on disk, `export`
writes what transformers loads, and `quantize` is the whole process in order.
"""
