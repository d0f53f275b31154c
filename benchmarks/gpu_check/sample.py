"""What compute-sanitizer watches: a training step and an inference of ResNet-18, every convolution a kernel of ours.

python -m benchmarks.gpu_check.sample [--rehearse]
"""

from __future__ import annotations

import sys

from benchmarks.gpu_check import scale, times


def main() -> None:
    size = scale.rehearsal() if "--rehearse" in sys.argv[1:] else scale.full()
    row = times.Row("fused", "triton" if size.on_gpu else "")
    with row.scope(size):
        for train in (True, False):
            times.net_step(row, size, train)()


if __name__ == "__main__":
    main()
