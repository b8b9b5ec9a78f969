"""Runs a command that ends when its starter ends, even by kill -9: `python -m stretto.demo.leash PID COMMAND ...`."""

from __future__ import annotations

import os
import sys

from stretto.process import die_with_parent


def main() -> None:
    # The kernel keeps this over exec.
    die_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
