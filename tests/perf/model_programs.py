"""Loops written by hand for the timing model."""

from tests.inspect.listings import repeat

SCORES = f"""
    WARPGROUP.ARRIVE
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT
    {repeat(2, "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24")}
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
"""
VALUES = f"""
    WARPGROUP.ARRIVE
    {repeat(3, "HGMMA.64x64x16.F32.BF16 R88, R56, gdesc[UR8].tnspB, R88")}
    HGMMA.64x64x16.F32.BF16 R88, R56, gdesc[UR8].tnspB, R88, gsb0
"""

# Ping-pong with a wait that only the first warpgroup makes and a rescaling that few blocks need.
PINGPONG = f"""
    loop:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R2
    @P0 BRA ->ready
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R2
    ready:
    @P4 BRA ->arrived
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR9], R2
    arrived:
    BAR.SYNC.DEFER_BLOCKING R5, 0x100
    {SCORES}
    {VALUES}
    BAR.ARV R6, 0x100
    WARPGROUP.DEPBAR.LE gsb0, 0x1
    {repeat(32, "FFMA R{0}, R{0}.reuse, R200, R201")}
    VOTE.ANY P1, P2
    {repeat(32, "MUFU.EX2 R{0}, R{0}")}
    {repeat(32, "FADD R210, R{0}, R210")}
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    @!P1 BRA ->calm
    {repeat(32, "FMUL R{2}, R{2}, R202")}
    calm:
    {repeat(16, "F2FP.BF16.F32.PACK_AB R{0}, R{1}, R{0}")}
    @P3 BRA ->loop
    EXIT
"""
