"""What compilers write about kernels, read."""

import pytest

from dyncomp.parallel.schedule import Registers, Schedule, schedules, told_by_ptxas

HEAD = "\n".join(
    ["slots", "MXU XLU VALU VPOP EUP VLOAD fills VSTORE spills SALU", "4 3 4 2 1 3 3 1 1 2", ""]
)
PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'fast' for 'sm_90a'
ptxas info    : Function properties for fast
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
ptxas info    : Compiling entry function 'slow' for 'sm_90a'
ptxas info    : Function properties for slow
    32 bytes stack frame, 48 bytes spill stores, 64 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem
"""


@pytest.fixture
def folder(tmp_path):
    rows = [[0] * 10, [4] + [0] * 9, [3, 0, 0, 0, 0, 0, 2, 0, 1, 0], [1] + [0] * 9]
    body = "\n".join(" ".join(map(str, row)) for row in rows)
    code = "0x0 : entry\n0x1 LB: > loop\n0x2 : > more\n0x3 : after\n"
    for name in ("my_kernel.3", "my_kernel_too"):
        start = f"17-{name}"
        (tmp_path / f"{start}-70-final_bundles.txt").write_text(code)
        (tmp_path / f"{start}-71-final_bundles-analysis-final_bundles.txt").write_text("")
        table = f"{start}-72-final_hlo-static-per-bundle-utilization.txt"
        (tmp_path / table).write_text(f"{HEAD}== UTILIZATION:\n{body}\n")
    return tmp_path


def test_the_busiest_stretch_of_a_kernel(folder):
    """The loop is bundles 1 and 2: 7 of 8 slots of the matrix units, one spill and two fills."""
    assert schedules(folder, ["my_kernel", "other"]) == {"my_kernel": Schedule(2, 7 / 8, 1, 2, 4)}


def test_registers_and_spills():
    assert told_by_ptxas(PTXAS) == {
        "fast": Registers(12, 0, 0, 0),
        "slow": Registers(255, 48, 64, 1024),
    }
