"""SASS written by hand, in nvdisasm's form, and an attention loop made to measure."""

from fa3.inspect.sass import Program, parse


def listing(text: str, name: str = "kernel") -> str:
    """nvdisasm's form of lines that are instructions or labels ("loop:")."""
    lines, address = [f".text.{name}:"], 0
    for line in text.strip().splitlines():
        line = line.split("//")[0].strip()
        if line.endswith(":"):
            lines.append(f".L_{line}")
        elif line:
            lines.append(
                f"        /*{address:04x}*/    {line.replace('->', '`(.L_') + close(line)} ;"
            )
            address += 16
    return "\n".join(lines)


def close(line: str) -> str:
    return ")" if "->" in line else ""


def program(text: str, name: str = "kernel") -> Program:
    """Branches are written as `@P0 BRA ->label`."""
    (found,) = parse(listing(text, name))
    return found


def repeat(count: int, line: str) -> str:
    """`count` lines; {0} is the number, {1} twice the number, {2} 88 more than the number."""
    return "\n".join(line.format(i, 2 * i, 88 + i) for i in range(count))


CHAIN = """
    WARPGROUP.ARRIVE
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
"""
EXPONENTIALS = repeat(32, "MUFU.EX2 R{0}, R{0}")

# What a warpgroup issues per block of keys: scores, exponentials, a rescaling of O that most
# blocks do not need, P V.
ATTENTION = f"""
    USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0
    loop:
    {CHAIN}
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    {repeat(32, "FFMA R{0}, R{0}, R200, R201")}
    VOTE.ANY P0, P1
    {EXPONENTIALS}
    @!P0 BRA ->calm
    MUFU.EX2 R202, R203
    {repeat(32, "FMUL R{0}, R{0}, R202")}
    calm:
    {repeat(16, "F2FP.BF16.F32.PACK_AB R{0}, R{1}, R{0}")}
    NOP
    WARPGROUP.ARRIVE
    HGMMA.64x64x16.F32.BF16 R88, R24, gdesc[UR8].tnspB, R88
    HGMMA.64x64x16.F32.BF16 R88, R28, gdesc[UR8].tnspB, R88, gsb0
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    @P2 BRA ->loop
    EXIT
"""
