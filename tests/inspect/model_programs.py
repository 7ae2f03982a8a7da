"""Loops written by hand for the timing model."""

from .listings import repeat

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

# A producer warp's way from V to V transposed, 1024 bytes at a time, with a wait that is met and a
# copy by TMA that only one warp asks for; behind it an 8-bit main loop.
TRANSPOSE = f"""
    turn:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R2
    @P0 BRA ->full
    spin:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R2
    @!P0 BRA ->spin
    full:
    @P5 BRA ->moved
    UTMALDG.4D [UR16], [UR4]
    moved:
    LDSM.16.MT88.4 R4, [R20]
    LDSM.16.MT88.4 R8, [R21]
    {repeat(8, "PRMT R{0}, R{0}, R30, R31")}
    STSM.16.M88.4 [R22], R4
    STSM.16.M88.4 [R23], R8
    @P1 BRA ->turn
    EXIT
"""
# The same from bytes of K or V to 16 bits, 1024 bytes at a time; behind it a 16-bit main loop.
WIDEN = f"""
    turn:
    LDS.128 R4, [R20]
    {repeat(8, "F2FP.F16.E4M3.UNPACK_B R{0}, R4")}
    STS.128 [R22], R8
    STS.128 [R23], R12
    @P1 BRA ->turn
    EXIT
"""
# A step back of 64 queries and 64 keys at head dim 64 in one warpgroup: S, dP; dV, dK; dQ, which
# leaves by RED, or by a copy of the producer, whose loop loads Q and dO with a number per row.
DQ = [
    f"""
    WARPGROUP.ARRIVE
    HGMMA.64x64x16.F32.BF16 R{first}, gdesc[UR8], RZ, !UPT
    {repeat(2, f"HGMMA.64x64x16.F32.BF16 R{first}, gdesc[UR8], R{first}")}
    HGMMA.64x64x16.F32.BF16 R{first}, gdesc[UR8], R{first}, gsb0
"""
    for first in (24, 56, 120)
]
BACKWARD = f"""
    loop:
    {DQ[0]}
    {DQ[1]}
    WARPGROUP.DEPBAR.LE gsb0, 0x1
    {repeat(32, "MUFU.EX2 R{0}, R{0}")}
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    {VALUES}
    {VALUES}
    {DQ[2]}
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    ADD_DQ
    @P3 BRA ->loop
    EXIT
"""
REDS = repeat(8, "REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR40][R4.64], R120")
# Two copies of one lane, each into room that all but the last KEEP before it have left.
COPIES = "".join(
    f"""
    ELECT P0, URZ, PT
    DEPBAR.LE SB0, 0xKEEP
    @!P0 BRA ->copied{n}
    UMOV UR28, 0x100
    UBLKRED.G.S.ADD.F32.RN [UR26], [UR30], UR28
    UTMACMDFLUSH
    copied{n}:
"""
    for n in range(2)
)
LOADS = """
    more:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R2
    MOV R2, 0x2100
    @P0 SYNCS.ARRIVE.TRANS64 RZ, [UR15], R2
    UTMALDG.4D [UR16], [UR4]
    IMAD.MOV.U32 R3, RZ, RZ, 0x2100
    @P0 SYNCS.ARRIVE.TRANS64 RZ, [UR15+0x8], R3
    UTMALDG.4D [UR18], [UR4]
    UBLKRED.G.S.ADD.F32.RN [UR8], [UR11], UR13
    @P1 BRA ->more
    EXIT
"""
SCORES_FP8 = f"""
    WARPGROUP.ARRIVE
    QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8], RZ, !UPT
    {repeat(2, "QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24")}
    QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24, gsb0
"""
VALUES_FP8 = f"""
    WARPGROUP.ARRIVE
    {repeat(3, "QGMMA.64x128x32.F32.E4M3.E4M3 R88, R56, gdesc[UR8], R88")}
    QGMMA.64x128x32.F32.E4M3.E4M3 R88, R56, gdesc[UR8], R88, gsb0
"""
FP8 = f"""
    loop:
    {SCORES_FP8}
    {VALUES_FP8}
    WARPGROUP.DEPBAR.LE gsb0, 0x1
    {repeat(64, "MUFU.EX2 R{0}, R{0}")}
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    @P3 BRA ->loop
    EXIT
"""
