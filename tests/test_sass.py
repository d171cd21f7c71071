"""bench/sass.py: which instructions count as the main loop, what a wait leaves in flight, and the model of cycles."""

import json

import pytest

from gci_kernels.bench import sass
from gci_kernels.bench.machine_code import main_loop, parse

# As nvdisasm prints it. The wait of .L_x_2 lies behind the loop and jumps into it; the store is not in every iteration;
# the last loop has one product alone.
LISTING = """
.text._expand_fwd_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   WARPGROUP.ARRIVE ;
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR13+0x24000], R6 ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR24].tnspB, R24 ;
        /*0060*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR24].tnspB, R24, gsb0 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0080*/               @P1 BRA `(.L_x_4) ;
        /*0090*/                   STG.E desc[UR4][R2.64], R24 ;
.L_x_4:
        /*00a0*/               @UP2 UTMALDG.2D [UR16], [UR24] ;
        /*00b0*/                   BRA.U UP0, `(.L_x_1) ;
.L_x_5:
        /*00c0*/                   HGMMA.64x256x16.F32.BF16 R24, R4, gdesc[UR24].tnspB, R24, gsb0 ;
        /*00d0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00e0*/               @P0 BRA `(.L_x_5) ;
        /*00f0*/                   EXIT ;
.L_x_2:
        /*0100*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR13+0x24000], R6 ;
        /*0110*/              @!P0 BRA `(.L_x_2) ;
        /*0120*/                   BRA `(.L_x_3) ;
.L_x_6:
        /*0130*/                   BRA `(.L_x_6);
        /*0140*/                   NOP;
"""


def lines(*names):
    """A loop of these instructions."""
    return "\n".join([".L_x_0:", *(f"    /*0010*/    {name} ;" for name in (*names, "@!P0 BRA `(.L_x_0)", "EXIT"))])


PRODUCT = "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR24], R24"
SMALL = "HGMMA.64x8x16.F32.BF16 R24, gdesc[UR24], R24"


def loop(text, warps=8):
    return sass._loop(main_loop(parse(text)), warps)


def test_the_main_loop_is_what_every_iteration_executes():
    names = [each.name.split(".")[0] for each in main_loop(parse(LISTING))]
    assert names == ["SYNCS", "BRA", "BAR", "HGMMA", "HGMMA", "WARPGROUP", "BRA", "UTMALDG", "BRA"]
    found = loop(LISTING)
    assert (found.barriers, found.memory_waits, found.bulk_loads, found.products) == (1, 1, 1, 2)


def test_no_product_no_main_loop():
    assert main_loop(parse(lines("FADD R1, R2, R3"))) is None
    assert main_loop(parse("        /*0000*/                   " + PRODUCT + " ;")) is None


def test_a_jump_that_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="a branch without a label"):
        parse("        /*0000*/                   BRA 0x120 ;")


def test_what_a_wait_leaves_in_flight():
    ahead = loop(lines(PRODUCT, PRODUCT, PRODUCT + ", gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"))
    assert (ahead.in_flight, ahead.drains) == (3, 0)
    serial = loop(lines(*[PRODUCT + ", gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"] * 3))
    assert (serial.in_flight, serial.drains) == (0, 3)
    # The first wait leaves the group before it, the second leaves nothing.
    both = loop(lines(PRODUCT + ", gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"))
    assert (both.in_flight, both.drains) == (0, 1)


def test_cycles():
    """A tile of 128x256x64 in 8 warps is 1024 cycles of the matrix unit; narrow products wait for shared memory."""
    wide = loop(lines(*[PRODUCT] * 3, PRODUCT + ", gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"))
    assert wide.matrix == 128 * 256 * 64 / 2048 == wide.cycles and wide.shared == 4 * 2 * 32 * (64 + 256) / 128
    narrow = loop(lines(SMALL, SMALL + ", gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"), warps=4)
    assert narrow.cycles == narrow.shared + 64 and narrow.shared == 2 * 32 * (64 + 8) / 128
    registers = loop(lines("HGMMA.64x8x16.F32.BF16 R24, R4, gdesc[UR24], R24, gsb0"), warps=4)
    assert registers.shared == 32 * 8 / 128 and registers.cycles == registers.matrix == 4


def test_a_compiled_kernel(capsys):
    """The base product on Hopper, and what the command prints of a training step."""
    arguments = ["--tokens", "512", "--features", "896", "896", "--rank", "16"]
    sass.main([*arguments, "--json"])
    made = json.loads(capsys.readouterr().out)
    assert made["capability"] == "sm_90"
    expand = next(each for each in made["launches"] if each["kernel"] == "expand_persistent")
    assert expand["loop"]["bulk_loads"] == 2 and expand["loop"]["in_flight"] > 0 and expand["spills"] == 0
    sass.main(arguments)
    table = capsys.readouterr().out
    assert "expand_persistent" in table and "bulk loads" in table
