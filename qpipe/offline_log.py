"""Offline logs of Weights & Biases, made fit for `wandb sync` after their writer was killed.

A log is written in the framing of LevelDB's log files: blocks of 32 KiB, records cut into chunks that do not cross a
block, each chunk with a header of 7 bytes (checksum, length, kind: whole, first, middle or last of a record). wandb
adds 7 bytes of its own at the start of the file. A process that is killed leaves a record incomplete at the end. Then
`wandb sync` (0.31) uploads what comes before, reports an error, leaves out the pieces of the run that follow, and would
upload the same rows again the next time. Without the incomplete record, of which nothing can be read, all is well.
"""

import os
from pathlib import Path

_BLOCK, _HEADER, _MARK = 32768, 7, b":W&B"
_WHOLE, _LAST = 1, 4


def drop_incomplete_end(log: Path) -> int:
    """Cut an incomplete record off the end of a log that nobody writes any more; return the bytes cut off."""
    content = log.read_bytes()
    length = complete_length(content)
    if length < len(content):
        os.truncate(log, length)
    return len(content) - length


def complete_length(content: bytes) -> int:
    """Return where the last complete record of a log ends (bytes); all of a file that is no such log."""
    if not content.startswith(_MARK):
        return len(content)
    position = end = _HEADER
    while position + _HEADER <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left  # too short for a header: filled up with zeros
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        position += _HEADER + length
        if position > len(content) or kind == 0:
            break
        if kind in (_WHOLE, _LAST):
            end = position
    return end
