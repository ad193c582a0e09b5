# SPDX-License-Identifier: Apache-2.0
"""``python -m gpuinfer``: the units call the command this way, so that no shebang matters."""

from gpuinfer.cli import main

if __name__ == "__main__":
    main()
