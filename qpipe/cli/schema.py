"""Write the JSON schema of study files, which editors use to complete and check them.

example:
  qpipe schema --out config/study.schema.json
"""

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `qpipe schema`."""
    parser.add_argument("--out", type=Path, help="file to write (default: print)")


def run(args: argparse.Namespace) -> int:
    """Write or print the schema."""
    from qpipe.files import write_text
    from qpipe.study import Study

    text = json.dumps(Study.model_json_schema(), indent=1) + "\n"
    if args.out:
        write_text(args.out, text)
    else:
        print(text, end="")
    return 0
