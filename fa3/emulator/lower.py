"""Decoded PTX -> Python/numpy source, one function per straight-line segment.

A register is a row of lanes (one warpgroup, up to 128); each register class has
a 2-D array in the Unit and lists of row views by interpretation:
    U/S/F  32-bit as uint/int/float     D/Q/E  64-bit     H/J/G  16-bit     P predicates
In a "full" segment every lane executes; in a "masked" one results are written
where m holds.  Anything that is not lane arithmetic is a call on the unit `w`
(see machine.Unit).  A segment returns the next pc, or -1 when the fragment `fr`
was blocked, split or has exited.
"""
import numpy as np

from . import numerics as N
from .ptx import Instr

BANK = {("w", "u"): "U", ("w", "s"): "S", ("w", "f"): "F", ("d", "u"): "D", ("d", "s"): "Q",
        ("d", "f"): "E", ("h", "u"): "H", ("h", "s"): "J", ("h", "f"): "G"}
DTYPE = {"u8": "u1", "s8": "i1", "b8": "u1", "u16": "u2", "s16": "i2", "b16": "u2", "f16": "f2", "bf16": "u2",
         "u32": "u4", "s32": "i4", "b32": "u4", "f32": "f4", "f16x2": "u4", "bf16x2": "u4", "tf32": "f4",
         "u64": "u8", "s64": "i8", "b64": "u8", "f64": "f8", "e4m3x2": "u2", "e5m2x2": "u2", "b128": "V16"}
KIND = {t: ("f" if d[0] == "f" else "s" if d[0] == "i" else "u") for t, d in DTYPE.items()}
CMP = {"lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "eq": "equal", "ne": "not_equal",
       "lo": "less", "ls": "less_equal", "hi": "greater", "hs": "greater_equal"}
NOOP = {"fence", "membar", "prefetch", "griddepcontrol", "setmaxnreg", "prefetchu", "applypriority", "discard",
        "createpolicy", "pmevent", "brkpt"}
PARAM_WINDOW, SHARED_WINDOW = 2 << 56, 1 << 56

# converged lanes an instruction needs before it may execute: whole warps or the whole warpgroup
SYNC_WARP = {"elect", "shfl", "vote", "match", "redux", "bar", "barrier", "ldmatrix", "stmatrix", "mma", "activemask"}


def sync_kind(ins):
    head = ins.parts[0]
    if head == "wgmma":
        return "wg"
    if head in ("bar", "barrier") and "warp" in ins.parts:
        return "warp"
    if head in SYNC_WARP and head != "activemask":
        if head in ("shfl", "vote", "elect", "match", "redux") and ins.args[-1] not in (("imm", -1), ("imm", 0xFFFFFFFF)):
            return None         # partial membermask: trust the program
        return "warp"
    return None


def terminates(ins):
    """Instructions that may block, split or leave: they end a segment."""
    h = ins.parts[0]
    return (h in ("bra", "ret", "exit", "trap", "nanosleep") or (h in ("bar", "barrier"))
            or (h == "mbarrier" and ins.parts[1] in ("try_wait", "test_wait"))
            or h == "call")


class Lower:
    def __init__(self, kernel, check_wgmma=False):
        self.k = kernel
        self.code = kernel.code
        self.leaders = set(kernel.labels.values())
        self.check_wgmma = check_wgmma
        self.cache = {}
        self.ns = {n: getattr(np, n) for n in
                   "add subtract multiply floor_divide less less_equal greater greater_equal equal not_equal "
                   "bitwise_and bitwise_or bitwise_xor invert left_shift right_shift logical_and logical_or logical_not "
                   "logical_xor minimum maximum fmin fmax negative absolute where copyto exp2 log2 sqrt tanh sin cos "
                   "isnan take copysign divide reciprocal floor ceil rint trunc ascontiguousarray".split()}
        self.ns.update(np=np, N=N, **{t: np.dtype(t).type for t in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")})
        self.nconst = {}

    # ---- operands ---------------------------------------------------------
    def const(self, value, dtype):
        """A one-element array: broadcasts, and keeps numpy from guessing types."""
        key = (value, dtype)
        if key not in self.nconst:
            name = f"k{len(self.nconst)}"
            d = np.dtype(dtype)
            if d.kind in "ui":
                arr = np.array([value & ((1 << 8 * d.itemsize) - 1)], f"u{d.itemsize}").view(d)
            else:
                arr = np.array([value], d)
            self.ns[name], self.nconst[key] = arr, name
        return self.nconst[key]

    def obj(self, value):
        name = f"o{len(self.ns)}"
        self.ns[name] = value
        return name

    def reg(self, name):
        return self.k.regs.get(name)

    def src(self, o, t):
        """Source text of operand o read as PTX type t."""
        kind = o[0]
        if kind == "reg":
            r = self.reg(o[1])
            if r:
                if r[0] == "p":
                    return f"P[{r[1]}]"
                want = KIND[t]
                row = f"{BANK[r[0], want]}[{r[1]}]"
                width = {"w": 4, "d": 8, "h": 2}[r[0]]
                need = np.dtype(DTYPE[t]).itemsize
                if need < width:        # narrow read of a wide register
                    if want == "f":
                        raise NotImplementedError(f"narrow float read {o} {t}")
                    return f"{row}.astype({DTYPE[t]})"
                if need > width:
                    raise NotImplementedError(f"wide read of {o} as {t}")
                return row
            if o[1].startswith("%"):
                return self.special(o[1], t)
            return self.symbol(o[1], t)
        if kind == "imm":
            d = np.dtype(DTYPE[t])
            return self.const(float(o[1]) if d.kind == "f" else o[1], DTYPE[t])
        if kind == "f32":
            if DTYPE[t] == "f4":
                return self.const_bits(o[1], "u4", "f4")
            return self.const(o[1], DTYPE[t])
        if kind == "f64":
            return self.const_bits(o[1], "u8", "f8") if KIND[t] == "f" else self.const(o[1], "u8")
        if kind == "not":
            return f"~{self.src(o[1], t)}"
        raise NotImplementedError(f"operand {o}")

    def const_bits(self, bits, udt, fdt):
        key = (bits, fdt, "bits")
        if key not in self.nconst:
            name = f"k{len(self.nconst)}"
            self.ns[name], self.nconst[key] = np.array([bits], udt).view(fdt), name
        return self.nconst[key]

    def special(self, name, t):
        if name in ("%clock", "%clock64", "%globaltimer", "%globaltimer_lo", "%clock_hi"):
            return f"w.clock({DTYPE[t]})"
        if name == "WARP_SZ":
            return self.const(32, DTYPE[t])
        text = f"w.sp['{name}']"
        return text if np.dtype(DTYPE[t]).itemsize == 4 else f"{text}.astype({DTYPE[t]})"

    def symbol(self, name, t):
        if name == "WARP_SZ":
            return self.const(32, DTYPE[t])
        if name in self.k.shared:
            return self.const(self.k.shared[name][0], DTYPE[t])
        for p in self.k.params:
            if p.name == name:
                return self.const(PARAM_WINDOW | p.offset, "u8")
        raise NotImplementedError(f"symbol {name}")

    def dst(self, o, t):
        """Destination row; a register wider than t is written extended."""
        if o[0] == "sink":
            return None
        r = self.reg(o[1])
        if r is None:
            raise NotImplementedError(f"destination {o}")
        return f"P[{r[1]}]" if r[0] == "p" else f"{BANK[r[0], KIND[t]]}[{r[1]}]"

    def addr(self, o, space):
        """(address row text, offset) of a memory operand."""
        assert o[0] == "mem", o
        b = o[1]
        if b[0] == "reg" and self.reg(b[1]):
            c = self.reg(b[1])[0]
            return f"{'U' if c == 'w' else 'D'}[{self.reg(b[1])[1]}]", o[2]
        if b[0] == "reg":
            return self.symbol(b[1], "u32" if b[1] in self.k.shared else "u64"), o[2]
        return self.const(b[1], "u4" if space == "shared" else "u8"), o[2]

    # ---- emission -----------------------------------------------------------
    def uf(self, f, d, *s):
        self.out.append(f"{f}({','.join(s)},out={d}{',where=' + self.m if self.m else ''})")

    def put(self, d, e):
        if d is None:
            return
        self.out.append(f"copyto({d},{e},where={self.m},casting='unsafe')" if self.m else f"{d}[:]={e}")

    def call(self, text):
        self.out.append(text)

    def segment(self, pc, full):
        key = (pc, full)
        if key not in self.cache:
            self.cache[key] = self.build(pc, full)
        return self.cache[key]

    def build(self, pc, full):
        start, body, n = pc, [], 0
        touched, written = set(), set()
        while True:
            if pc >= len(self.code):
                body.append("return w.exit(fr)")
                break
            ins = self.code[pc]
            if pc != start and pc in self.leaders:
                body.append(f"return {pc}")
                break
            if pc != start and not full and sync_kind(ins):
                body.append(f"return {pc}")
                break
            if self.check_wgmma and pc != start and ins.parts[0] == "wgmma":
                body.append(f"return {pc}")
                break
            self.out, self.m = [], None if full else "m"
            self.pc, self.ins = pc, ins
            n += 1
            try:
                if terminates(ins):
                    self.terminator(ins, full)
                    body += self.out
                    break
                if ins.pred:
                    p = f"P[{self.reg(ins.pred)[1]}]"
                    p = f"~{p}" if ins.neg else p
                    self.out.append(f"m1={p}" if full else f"m1={p}&m")
                    self.m = "m1"
                self.emit(ins)
            except (NotImplementedError, KeyError, AttributeError, AssertionError, ValueError, IndexError) as e:
                raise NotImplementedError(f"PTX line {ins.line}: {ins.text}  [{type(e).__name__}: {e}]") from e
            body += self.out
            if self.check_wgmma:
                touched |= self.registers(ins)
                written |= self.registers(Instr(ins.op, ins.args[:1], parts=ins.parts))
            pc += 1
            if self.check_wgmma and ins.parts[0] == "wgmma":
                body.append(f"return {pc}")
                break
        text = "\n ".join(body)
        head = ";".join(f"{b}=w.{b}" for b in "USFDQEHJGP" if f"{b}[" in text)
        src = f"def seg(w,fr):\n {head or 'pass'}\n" + ("" if full else " m=fr.mask\n") + " " + text + "\n"
        exec(compile(src, f"<{self.k.name[:40]} pc={start} {'full' if full else 'masked'}>", "exec"), self.ns)
        return self.ns.pop("seg"), n, frozenset(touched), frozenset(written)

    def registers(self, ins):
        """32-bit registers named by an instruction (for the unwaited-accumulator check)."""
        if ins.parts[0] == "wgmma":
            return set()
        found, todo = set(), list(ins.args)
        while todo:
            o = todo.pop()
            if isinstance(o, (list, tuple)):
                if len(o) == 2 and o[0] == "reg":
                    r = self.reg(o[1])
                    if r and r[0] == "w":
                        found.add(r[1])
                else:
                    todo.extend(x for x in o if isinstance(x, (list, tuple)))
        return found

    # ---- control ------------------------------------------------------------
    def terminator(self, ins, full):
        h, nxt = ins.parts[0], self.pc + 1
        if h == "bra":
            target = self.k.labels[ins.args[0][1]]
            if not ins.pred:
                return self.call(f"return {target}")
            p = f"P[{self.reg(ins.pred)[1]}]"
            a, b = (nxt, target) if ins.neg else (target, nxt)      # a: where lanes with p go
            if full:
                self.call(f"b={p}.tobytes()")
                self.call(f"if b==w.ones: return {a}")
                self.call(f"if b==w.zeros: return {b}")
                self.call(f"return w.split(fr,{p},{a},{b})")
            else:
                self.call(f"return w.branch(fr,{p},{a},{b})")
            return
        if ins.pred:        # predicated blocking instruction: branch around it
            p = f"P[{self.reg(ins.pred)[1]}]"
            self.call(f"t=w.guard(fr,{p},{ins.neg},{self.pc},{nxt})")
            self.call("if t is not None: return t")
        if h in ("ret", "exit"):
            return self.call("return w.exit(fr)")
        if h == "trap":
            return self.call(f"w.trap({ins.line})")
        if h == "nanosleep":
            return self.call(f"return w.pause(fr,{nxt})")
        if h == "mbarrier":
            return self.wait_mbarrier(ins, nxt)
        if h in ("bar", "barrier"):
            return self.barrier(ins, nxt)
        raise NotImplementedError("control")

    def wait_mbarrier(self, ins, nxt):
        p = self.dst(ins.args[0], "u32")
        a, off = self.addr(ins.args[1], "shared")
        par = "parity" in ins.parts
        x = self.src(ins.args[2], "u32" if par else "u64")
        self.call(f"return w.wait_mbarrier(fr,{p},{a},{off},{x},{par},{ins.parts[1] == 'try_wait'},{self.pc},{nxt})")

    def barrier(self, ins, nxt):
        q = ins.parts
        if "warp" in q:
            return self.call(f"return {nxt}")
        if "cluster" in q:
            f = "arrive" if "arrive" in q else "wait"
            return self.call(f"return w.cluster_{f}(fr,{self.pc},{nxt})")
        if "red" in q:
            raise NotImplementedError("bar.red")
        ident = self.src(ins.args[0], "u32")
        count = self.src(ins.args[1], "u32") if len(ins.args) > 1 else "None"
        self.call(f"return w.barrier(fr,{ident},{count},{'arrive' in q},{self.pc},{nxt})")

    # ---- instruction selection ----------------------------------------------
    def emit(self, ins):
        h = ins.parts[0]
        if h == "fence" and "async" in "".join(ins.parts[1:]) and "proxy" in ins.parts:
            return self.call(f"w.fence_async({self.m})")
        if h in NOOP or (h == "cp" and "prefetch" in ins.parts):
            return self.call("pass")
        return getattr(self, "op_" + h)(ins, ins.parts, ins.args)

    def arith(self, q, a, table, t=None):
        """Binary operation by type: table maps 'f'/'i' to a numpy function."""
        t = t or q[-1]
        if t.endswith("x2") or t == "bf16":
            op = self.obj(getattr(np, table["f"]))
            args = ",".join(self.src(x, t) for x in a[1:])
            return self.put(self.dst(a[0], t), f"w.half_op({op},'{t}',{args})")
        f = table["f"] if KIND[t] == "f" else table["i"]
        self.uf(f, self.dst(a[0], t), *(self.src(x, t) for x in a[1:]))
        if "sat" in q and KIND[t] == "f":
            d = self.dst(a[0], t)
            self.put(d, f"fmin(fmax({d},f4(0)),f4(1))")

    def op_add(self, i, q, a):
        if "cc" in q:
            raise NotImplementedError("carry")
        self.arith(q, a, {"f": "add", "i": "add"})

    def op_sub(self, i, q, a):
        self.arith(q, a, {"f": "subtract", "i": "subtract"})

    def op_mul(self, i, q, a):
        t = q[-1]
        if q[1] == "wide":
            wide = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}[t]
            dt = DTYPE[wide]
            return self.put(self.dst(a[0], wide),
                            f"multiply({self.src(a[1], t)}.astype({dt}),{self.src(a[2], t)}.astype({dt}))")
        if q[1] == "hi":
            return self.put(self.dst(a[0], t), f"w.mulhi({self.src(a[1], t)},{self.src(a[2], t)})")
        self.arith(q, a, {"f": "multiply", "i": "multiply"})

    op_mul24 = op_mul

    def op_mad(self, i, q, a):
        t = q[-1]
        if KIND[t] == "f":
            return self.op_fma(i, q, a)
        if q[1] == "wide":
            wide = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}[t]
            dt = DTYPE[wide]
            return self.put(self.dst(a[0], wide), f"{self.src(a[1], t)}.astype({dt})*{self.src(a[2], t)}.astype({dt})"
                                                  f"+{self.src(a[3], wide)}")
        mul = f"w.mulhi({self.src(a[1], t)},{self.src(a[2], t)})" if q[1] == "hi" else \
              f"multiply({self.src(a[1], t)},{self.src(a[2], t)})"
        self.uf("add", self.dst(a[0], t), mul, self.src(a[3], t))

    def op_fma(self, i, q, a):
        t = q[-1]
        s = [self.src(x, t) for x in a[1:]]
        if t == "f32":      # the product is exact in double
            return self.put(self.dst(a[0], t), f"({s[0]}.astype(f8)*{s[1]}+{s[2]}).astype(f4)")
        if t == "f64":
            return self.put(self.dst(a[0], t), f"{s[0]}*{s[1]}+{s[2]}")
        self.put(self.dst(a[0], t), f"w.half_fma('{t}',{','.join(s)},{'relu' in q})")

    def op_div(self, i, q, a):
        t = q[-1]
        s = [self.src(x, t) for x in a[1:]]
        self.put(self.dst(a[0], t), f"divide({s[0]},{s[1]})" if KIND[t] == "f" else f"w.idiv({s[0]},{s[1]})")

    def op_rem(self, i, q, a):
        t = q[-1]
        x, y = (self.src(v, t) for v in a[1:])
        self.put(self.dst(a[0], t), f"{x}-w.idiv({x},{y})*{y}")

    def op_neg(self, i, q, a):
        self.arith(q, a, {"f": "negative", "i": "negative"})

    def op_abs(self, i, q, a):
        self.arith(q, a, {"f": "absolute", "i": "absolute"})

    def op_copysign(self, i, q, a):         # the sign of a on the magnitude of b
        t = q[-1]
        self.uf("copysign", self.dst(a[0], t), self.src(a[2], t), self.src(a[1], t))

    def minmax(self, q, a, ordered, nan):
        t = q[-1]
        f = (nan if "NaN" in q else ordered)
        if t.endswith("x2") or t == "bf16":
            return self.arith(q, a, {"f": f, "i": f})
        fn = f if KIND[t] == "f" else nan
        d, s = self.dst(a[0], t), [self.src(x, t) for x in a[1:]]
        expr = f"{fn}({s[0]},{s[1]})"
        for x in s[2:]:
            expr = f"{fn}({expr},{x})"
        if "relu" in q:
            expr = f"maximum({expr},{self.const(0, DTYPE[t])})"
        if len(s) == 2 and "relu" not in q:
            return self.uf(fn, d, *s)
        self.put(d, expr)

    def op_min(self, i, q, a):
        self.minmax(q, a, "fmin", "minimum")

    def op_max(self, i, q, a):
        self.minmax(q, a, "fmax", "maximum")

    def logic(self, f, pf, q, a):
        t = q[-1]
        if t == "pred":
            return self.uf(pf, self.dst(a[0], "u32"), *(self.pred(x) for x in a[1:]))
        self.uf(f, self.dst(a[0], t), *(self.src(x, t) for x in a[1:]))

    def pred(self, o):
        if o[0] == "imm":
            return self.const(bool(o[1]), "?")
        if o[0] == "not":
            return f"~{self.pred(o[1])}"
        return self.src(o, "u32")

    def op_and(self, i, q, a):
        self.logic("bitwise_and", "logical_and", q, a)

    def op_or(self, i, q, a):
        self.logic("bitwise_or", "logical_or", q, a)

    def op_xor(self, i, q, a):
        self.logic("bitwise_xor", "logical_xor", q, a)

    def op_not(self, i, q, a):
        self.logic("invert", "logical_not", q, a)

    def op_shl(self, i, q, a):
        t = q[-1]
        n = self.src(a[2], "u32")
        self.uf("left_shift", self.dst(a[0], t), self.src(a[1], t),
                n if DTYPE[t] == "u4" else f"{n}.astype({DTYPE[t]})")

    def op_shr(self, i, q, a):
        t = q[-1]
        n = self.src(a[2], "u32")
        if KIND[t] == "s":
            n = f"minimum({n},u4(63)).astype({DTYPE[t]})" if a[2][0] != "imm" else self.const(a[2][1], DTYPE[t])
        elif DTYPE[t] != "u4":
            n = f"{n}.astype({DTYPE[t]})"
        self.uf("right_shift", self.dst(a[0], t), self.src(a[1], t), n)

    def op_shf(self, i, q, a):
        lo, hi, n = (self.src(x, "u32") for x in a[1:])
        self.put(self.dst(a[0], "u32"), f"w.shf({lo},{hi},{n},{q[1] == 'l'},{'wrap' in q})")

    def op_bfe(self, i, q, a):
        t = q[-1]
        self.put(self.dst(a[0], t), f"w.bfe({self.src(a[1], t)},{self.src(a[2], 'u32')},{self.src(a[3], 'u32')})")

    def op_bfi(self, i, q, a):
        t = q[-1]
        self.put(self.dst(a[0], t), f"w.bfi({self.src(a[1], t)},{self.src(a[2], t)},"
                                    f"{self.src(a[3], 'u32')},{self.src(a[4], 'u32')})")

    def op_lop3(self, i, q, a):
        self.put(self.dst(a[0], "u32"), f"w.lop3({self.src(a[1], 'u32')},{self.src(a[2], 'u32')},"
                                        f"{self.src(a[3], 'u32')},{a[4][1]})")

    def op_prmt(self, i, q, a):
        assert q[1] == "b32" and len(q) == 2
        self.put(self.dst(a[0], "u32"), f"w.prmt({','.join(self.src(x, 'u32') for x in a[1:4])})")

    def op_dp2a(self, i, q, a):         # NVVM uses these for address arithmetic
        t, u = q[-2], q[-1]
        d = "s32" if "s32" in (t, u) else "u32"
        self.put(self.dst(a[0], d), f"w.dot({self.src(a[1], t)},{self.src(a[2], u)},{self.src(a[3], d)},"
                                    f"{2 if q[0] == 'dp2a' else 1},{2 if 'hi' in q else 0})")

    op_dp4a = op_dp2a

    def op_popc(self, i, q, a):
        self.put(self.dst(a[0], "u32"), f"np.bitwise_count({self.src(a[1], q[-1])})")

    def op_clz(self, i, q, a):
        self.put(self.dst(a[0], "u32"), f"w.clz({self.src(a[1], q[-1])})")

    def op_bfind(self, i, q, a):
        assert q[-1] == "u32"
        top = f"u4(31)-w.clz({self.src(a[1], 'u32')})"
        self.put(self.dst(a[0], "u32"), f"w.clz({self.src(a[1], 'u32')})" if "shiftamt" in q else top)

    def op_brev(self, i, q, a):
        self.put(self.dst(a[0], "u32"), f"w.brev({self.src(a[1], 'u32')})")

    def op_selp(self, i, q, a):
        t = q[-1]
        self.put(self.dst(a[0], t), f"where({self.pred(a[3])},{self.src(a[1], t)},{self.src(a[2], t)})")

    def op_setp(self, i, q, a):
        t, cmp = q[-1], q[1]
        if t == "bf16" or t.endswith("x2"):
            raise NotImplementedError("half compare")
        x, y = self.src(a[1], t), self.src(a[2], t)
        d, neg = (a[0][1], a[0][2]) if a[0][0] == "pair" else (a[0], None)
        d = self.dst(d, "u32")
        flt = KIND[t] == "f"
        if flt and cmp == "ne":
            e = f"not_equal({x},{y})&~(isnan({x})|isnan({y}))"
        elif flt and cmp == "nan":
            e = f"isnan({x})|isnan({y})"
        elif flt and cmp == "num":
            e = f"~(isnan({x})|isnan({y}))"
        elif flt and cmp in ("ltu", "leu", "gtu", "geu", "equ"):
            inv = {"ltu": "greater_equal", "leu": "greater", "gtu": "less_equal", "geu": "less"}
            e = f"~{inv[cmp]}({x},{y})" if cmp in inv else f"equal({x},{y})|isnan({x})|isnan({y})"
        elif flt and cmp == "neu":
            e = f"not_equal({x},{y})"
        else:
            e = f"{CMP[cmp]}({x},{y})"
            if len(a) == 3 and neg is None:
                return self.uf(CMP[cmp], d, x, y)
        if len(a) == 4:
            c = self.pred(a[3])
            f = {"and": "&", "or": "|", "xor": "^"}[q[2]]
            self.out.append(f"t=({e})")
            self.put(d, f"t{f}{c}")
            if neg:
                self.put(self.dst(neg, "u32"), f"(~t){f}{c}")
            return
        self.out.append(f"t=({e})")
        self.put(d, "t")
        if neg:
            self.put(self.dst(neg, "u32"), "~t")

    def op_set(self, i, q, a):
        t = q[-1]
        one = "0xffffffff" if q[-2] != "f32" else "0x3f800000"
        self.put(self.dst(a[0], "u32"), f"where({CMP[q[1]]}({self.src(a[1], t)},{self.src(a[2], t)}),u4({one}),u4(0))")

    def op_slct(self, i, q, a):
        t = q[1]
        self.put(self.dst(a[0], t), f"where({self.src(a[3], q[2])}>=0,{self.src(a[1], t)},{self.src(a[2], t)})")

    def unary(self, f, q, a):
        t = q[-1]
        if t == "f32":
            return self.uf(f, self.dst(a[0], t), self.src(a[1], t))
        if t == "f64":
            return self.uf(f, self.dst(a[0], t), self.src(a[1], t))
        self.put(self.dst(a[0], t), f"w.half_op({f},'{t}',{self.src(a[1], t)})")

    def op_ex2(self, i, q, a):
        self.unary("exp2", q, a)

    def op_lg2(self, i, q, a):
        self.unary("log2", q, a)

    def op_rcp(self, i, q, a):
        self.unary("reciprocal", q, a)

    def op_sqrt(self, i, q, a):
        self.unary("sqrt", q, a)

    def op_tanh(self, i, q, a):
        self.unary("tanh", q, a)

    def op_sin(self, i, q, a):
        self.unary("sin", q, a)

    def op_cos(self, i, q, a):
        self.unary("cos", q, a)

    def op_rsqrt(self, i, q, a):
        self.put(self.dst(a[0], q[-1]), f"reciprocal(sqrt({self.src(a[1], q[-1])}))")

    # ---- moves and conversions -----------------------------------------------
    def op_mov(self, i, q, a):
        t = q[-1]
        d, s = a
        if s[0] == "vec":               # pack
            n = len(s[1])
            if t == "b64" and n == 2:
                lo, hi = (self.src(x, "u32") for x in s[1])
                return self.put(self.dst(d, "u64"), f"{lo}.astype(u8)|({hi}.astype(u8)<<u8(32))")
            if t == "b32" and n == 2:
                lo, hi = (self.src(x, "u16") for x in s[1])
                return self.put(self.dst(d, "u32"), f"{lo}.astype(u4)|({hi}.astype(u4)<<u4(16))")
            if t == "b32" and n == 4:
                b = [self.src(x, "u8") for x in s[1]]
                return self.put(self.dst(d, "u32"), "|".join(f"({x}.astype(u4)<<u4({8 * j}))" for j, x in enumerate(b)))
            if t == "b16" and n == 2:
                lo, hi = (self.src(x, "u8") for x in s[1])
                return self.put(self.dst(d, "u16"), f"{lo}.astype(u2)|({hi}.astype(u2)<<u2(8))")
            if t == "b64" and n == 4:
                b = [self.src(x, "u16") for x in s[1]]
                return self.put(self.dst(d, "u64"), "|".join(f"({x}.astype(u8)<<u8({16 * j}))" for j, x in enumerate(b)))
            raise NotImplementedError("pack")
        if d[0] == "vec":               # unpack
            n = len(d[1])
            width = {"b64": 8, "b32": 4, "b16": 2}[t]
            part = width // n
            src = self.src(s, t)
            self.out.append(f"t={src}")
            for j, o in enumerate(d[1]):
                if o[0] == "sink":
                    continue
                self.put(self.dst(o, {4: "u32", 2: "u16", 1: "u8"}[part]),
                         f"(t>>u{width}({8 * part * j})).astype(u{part})")
            return
        if t == "pred":
            return self.put(self.dst(d, "u32"), self.pred(s))
        self.put(self.dst(d, t), self.src(s, t))

    def op_cvta(self, i, q, a):
        t = q[-1]
        x = self.src(a[1], t)
        if "shared" in q[1 if q[1] != "to" else 2]:
            e = f"{x}&u8({SHARED_WINDOW - 1})" if q[1] == "to" else f"{x}|u8({SHARED_WINDOW})"
            return self.put(self.dst(a[0], t), e)
        self.put(self.dst(a[0], t), x)      # global and (windowed) param addresses are generic already

    def op_cvt(self, i, q, a):
        ts = [x for x in q[1:] if x in DTYPE]
        dt, st = ts[0], ts[1]
        mods = tuple(x for x in q[1:] if x not in DTYPE)
        if len(a) == 3:
            return self.put(self.dst(a[0], dt),
                            f"N.cvt_pair('{dt}','{st}',{mods},{self.src(a[1], 'f32')},{self.src(a[2], 'f32')},w.L)")
        if st.endswith("x2") and dt.endswith("x2"):
            return self.put(self.dst(a[0], dt), f"N.cvt_unpair('{dt}','{st}',{self.src(a[1], st)},w.L)")
        s = self.src(a[1], st)
        d = self.dst(a[0], dt)
        if KIND[dt] != "f" and KIND[st] != "f" and "bf16" not in ts and "sat" not in mods:
            if np.dtype(DTYPE[dt]).itemsize < {"w": 4, "d": 8, "h": 2}[self.reg(a[0][1])[0]]:
                return self.put(d, f"{s}.astype({DTYPE[dt]})")      # narrow, then extend into the register
            return self.put(d, f"{s}.astype({DTYPE[dt]})")
        if st == "f32" and dt == "f32" and not mods:
            return self.put(d, s)
        self.put(d, f"N.cvt('{dt}','{st}',{mods},{s})")

    # ---- memory ---------------------------------------------------------------
    SPACES = {"global", "shared", "param", "local", "const", "shared::cta", "shared::cluster"}

    def space(self, q):
        s = next((x for x in q if x in self.SPACES or x.startswith("shared") or x.startswith("param")), "generic")
        return s

    def vec(self, o):
        return o[1] if o[0] == "vec" else [o]

    def op_ld(self, i, q, a):
        t = q[-1]
        sp = self.space(q)
        dts = DTYPE[t]
        ds = [self.dst(x, t) for x in self.vec(a[0])]
        if sp.startswith("param"):
            m = a[1]
            p = next((p for p in self.k.params if p.name == m[1][1]), None)
            if p is not None:
                es = np.dtype(dts).itemsize
                for j, d in enumerate(ds):
                    off = p.offset + m[2] + j * es
                    self.put(d, f"w.params[{off}:{off + es}].view({dts})")
                return
            sp = "generic"
        addr, off = self.addr(a[1], "shared" if sp.startswith("shared") else sp)
        rows = "[" + ",".join(d or "None" for d in ds) + "]"
        f = "ld_shared" if sp.startswith("shared") else "ld_global"
        self.call(f"w.{f}({self.m},{dts},{rows},{addr},{off})")

    op_ldu = op_ld

    def op_st(self, i, q, a):
        t = q[-1]
        sp = self.space(q)
        addr, off = self.addr(a[0], "shared" if sp.startswith("shared") else sp)
        rows = "[" + ",".join(self.src(x, t) for x in self.vec(a[1])) + "]"
        if q[1] == "async":
            mb, mo = self.addr(a[2], "shared")
            return self.call(f"w.st_async({self.m},{DTYPE[t]},{rows},{addr},{off},{mb},{mo})")
        f = "st_shared" if sp.startswith("shared") else "st_global"
        self.call(f"w.{f}({self.m},{DTYPE[t]},{rows},{addr},{off})")

    def atomic(self, i, q, a, has_dst):
        if "async" in q:
            raise NotImplementedError("red.async")
        t = q[-1]
        sp = "shared" if any(x.startswith("shared") for x in q) else "global"
        ops = {"add", "min", "max", "and", "or", "xor", "inc", "dec", "exch", "cas"}
        op = next(x for x in q[1:] if x in ops)
        d, a = (a[0], a[1:]) if has_dst else (("sink",), a)
        vec = self.vec(a[1])
        addr, off = self.addr(a[0], sp)
        es = np.dtype(DTYPE[t]).itemsize
        ds = self.vec(d) if d[0] != "sink" else [("sink",)] * len(vec)
        for j, (x, y) in enumerate(zip(ds, vec)):
            row = self.dst(x, t) if x[0] != "sink" else "None"
            extra = self.src(a[2], t) if op == "cas" else "None"
            self.call(f"w.atomic({self.m},'{sp}','{op}','{t}',{DTYPE[t]},{row},{addr},{off + j * es},{self.src(y, t)},{extra})")

    def op_atom(self, i, q, a):
        self.atomic(i, q, a, True)

    def op_red(self, i, q, a):
        self.atomic(i, q, a, False)

    def op_mapa(self, i, q, a):
        assert q[-1] == "u32" and "cluster" in "".join(q)
        x = self.src(a[1], "u32")
        self.put(self.dst(a[0], "u32"), f"({x}&u4(0xffffff))|(({self.src(a[2], 'u32')}+u4(1))<<u4(24))")

    def op_getctarank(self, i, q, a):
        x = self.src(a[1], "u32")
        self.put(self.dst(a[0], "u32"), f"where({x}>>u4(24),({x}>>u4(24))-u4(1),u4(w.cta.rank))")

    def op_isspacep(self, i, q, a):
        x = self.src(a[1], "u64")
        e = {"global": f"({x}>>u8(56))==0", "shared": f"({x}>>u8(56))==1"}[q[1].split("::")[0]]
        self.put(self.dst(a[0], "u32"), e)

    def op_ldmatrix(self, i, q, a):
        if "m8n8" not in q or q[-1] != "b16":
            raise NotImplementedError("ldmatrix form")
        addr, off = self.addr(a[1], "shared")
        rows = "[" + ",".join(self.dst(x, "u32") for x in self.vec(a[0])) + "]"
        self.call(f"w.ldmatrix({self.m},{rows},{addr},{off},{'trans' in q})")

    def op_stmatrix(self, i, q, a):
        if "m8n8" not in q or q[-1] != "b16":
            raise NotImplementedError("stmatrix form")
        addr, off = self.addr(a[0], "shared")
        rows = "[" + ",".join(self.src(x, "u32") for x in self.vec(a[1])) + "]"
        self.call(f"w.stmatrix({self.m},{rows},{addr},{off},{'trans' in q})")

    # ---- warp-level -------------------------------------------------------------
    def op_elect(self, i, q, a):
        d, p = (a[0][1], a[0][2]) if a[0][0] == "pair" else (None, a[0])
        self.out.append(f"t,e=w.elect({self.m})")
        self.put(self.dst(p, "u32"), "t")
        if d and d[0] != "sink":
            self.put(self.dst(d, "u32"), "e")

    def op_shfl(self, i, q, a):
        d, p = (a[0][1], a[0][2]) if a[0][0] == "pair" else (a[0], None)
        if a[2][0] == a[3][0] == "imm":
            perm, ok = self.shuffle(q[2], a[2][1], a[3][1])
            idx = self.obj(perm)
            self.put(self.dst(d, "u32"), f"{self.src(a[1], 'u32')}[{idx}[:w.L]]" if a[1][0] == "reg" else self.src(a[1], "u32"))
            if p:
                self.put(self.dst(p, "u32"), f"{self.obj(ok)}[:w.L]")
            return
        self.out.append(f"t,e=w.shfl('{q[2]}',{self.src(a[1], 'u32')},{self.src(a[2], 'u32')},{self.src(a[3], 'u32')})")
        self.put(self.dst(d, "u32"), "t")
        if p:
            self.put(self.dst(p, "u32"), "e")

    @staticmethod
    def shuffle(mode, b, c, lanes=128):
        """Source lane and validity for every lane (b, c scalars or rows)."""
        lane = np.arange(lanes) & 31
        warp = np.arange(lanes) & ~31
        b, seg, cval = np.asarray(b).astype(np.int64) & 31, (np.asarray(c).astype(np.int64) >> 8) & 31, np.asarray(c).astype(np.int64) & 31
        maxlane = (lane & seg) | (cval & ~seg & 31)
        minlane = lane & seg
        if mode == "up":
            j = lane - b
            ok = j >= maxlane
        elif mode == "down":
            j = lane + b
            ok = j <= maxlane
        elif mode == "bfly":
            j = lane ^ b
            ok = j <= maxlane
        else:
            j = minlane | (b & ~seg & 31)
            ok = j <= maxlane
        return np.where(ok, j, lane) + warp, ok

    def op_vote(self, i, q, a):
        self.out.append(f"t=w.vote({self.m},'{q[2]}',{self.pred(a[1])})")
        self.put(self.dst(a[0], "u32"), "t")

    def op_activemask(self, i, q, a):
        self.put(self.dst(a[0], "u32"), f"w.vote({self.m},'ballot',np.ones(w.L,bool))")

    def op_match(self, i, q, a):
        assert q[1] == "any"
        self.put(self.dst(a[0], "u32"), f"w.match_any({self.m},{self.src(a[1], q[-1])})")

    def op_redux(self, i, q, a):
        self.put(self.dst(a[0], q[-1]), f"w.redux({self.m},'{q[2]}',{self.src(a[1], q[-1])})")

    # ---- matrix units --------------------------------------------------------------
    def op_mma(self, i, q, a):
        shape = next(x for x in q if x.startswith("m16"))
        types = [x for x in q if x in ("f16", "bf16", "f32", "tf32", "e4m3", "e5m2", "s8", "s32", "u8")]
        idx = [[self.reg(x[1])[1] for x in self.vec(v)] for v in a[1:3]]
        c = [self.src(x, "u32") for x in self.vec(a[3])]
        d = [self.reg(x[1])[1] for x in self.vec(a[0])]
        self.call(f"w.mma({self.m},'{shape}',{types},{d},{idx[0]},{idx[1]},[{','.join(c)}])")

    def op_wgmma(self, i, q, a):
        if q[1] == "fence":
            return self.call("w.wgmma_fence()")
        if q[1] == "commit_group":
            return self.call("w.wgmma_commit()")
        if q[1] == "wait_group":
            return self.call(f"w.wgmma_wait({a[0][1]})")
        shape, (dt, at, bt) = q[4], [x for x in q[5:] if x not in ("sp", "satfinite")]
        spec = {"n": int(shape.split("n")[1].split("k")[0]), "k": int(shape.split("k")[1]), "dt": dt, "at": at, "bt": bt,
                "line": i.line}
        acc = np.array([self.reg(x[1])[1] for x in self.vec(a[0])])
        spec["acc"] = slice(int(acc[0]), int(acc[-1]) + 1) if (np.diff(acc) == 1).all() else acc
        spec["acc_set"] = frozenset(acc.tolist())
        rest = a[3:]
        if a[1][0] == "vec":
            spec["a_regs"] = np.array([self.reg(x[1])[1] for x in a[1][1]])
            da = "None"
        else:
            da = self.src(a[1], "u64")
        scale = rest[0]
        ints = [x[1] for x in rest[1:]]
        spec["neg_a"], spec["neg_b"] = ints[:2] if len(ints) >= 2 else (1, 1)
        trans = ints[2:]
        spec["tra"], spec["trb"] = (0, trans[0]) if len(trans) == 1 else (trans + [0, 0])[:2]
        s = self.pred(scale) if scale[0] != "imm" else repr(bool(scale[1]))
        self.call(f"w.wgmma({self.obj(spec)},{da},{self.src(a[2], 'u64')},{s})")

    # ---- barriers and bulk copies ------------------------------------------------
    def op_mbarrier(self, i, q, a):
        k = q[1]
        if k in ("init", "inval"):
            addr, off = self.addr(a[0], "shared")
            n = self.src(a[1], "u32") if k == "init" else "None"
            return self.call(f"w.mbar_init({self.m},{addr},{off},{n})")
        if k in ("expect_tx", "complete_tx"):
            addr, off = self.addr(a[0], "shared")
            return self.call(f"w.mbar_tx({self.m},{addr},{off},{self.src(a[1], 'u32')},{1 if k == 'expect_tx' else -1})")
        if k in ("arrive", "arrive_drop"):
            if k == "arrive_drop":
                raise NotImplementedError("arrive_drop")
            d, a = (a[0], a[1:]) if a[0][0] != "mem" else (("sink",), a)
            addr, off = self.addr(a[0], "shared")
            x = self.src(a[1], "u32") if len(a) > 1 else "None"
            row = self.dst(d, "u64") if d[0] != "sink" else "None"
            return self.call(f"w.mbar_arrive({self.m},{row},{addr},{off},{x},{'expect_tx' in q})")
        raise NotImplementedError(k)

    def op_cp(self, i, q, a):
        """cp.async (Ampere), cp.async.bulk[.tensor], cp.reduce.async.bulk[.tensor]."""
        m = self.m
        if "commit_group" in q:
            return self.call(f"w.bulk_commit({m})" if "bulk" in q else f"w.cpasync_commit({m})")
        if "wait_group" in q or "wait_all" in q:
            n = a[0][1] if a else None
            return self.call(f"w.bulk_wait({m},{n},{'read' in q})" if "bulk" in q else f"w.cpasync_wait({m},{n})")
        if "mbarrier" in q and "arrive" in q:
            addr, off = self.addr(a[0], "shared")
            return self.call(f"w.cpasync_mbar_arrive({m},{addr},{off},{'noinc' in q})")
        if "bulk" not in q:             # cp.async.ca.shared.global [dst], [src], size{, src-size}
            d, do = self.addr(a[0], "shared")
            s, so = self.addr(a[1], "global")
            ignore = self.src(a[3], "u32") if len(a) > 3 and a[3][0] in ("imm", "reg") else "None"
            return self.call(f"w.cp_async({m},{a[2][1]},{d},{do},{s},{so},{ignore})")
        red = next((x for x in ("add", "min", "max", "inc", "dec", "and", "or", "xor") if x in q), None) if q[1] == "reduce" else None
        if "tensor" in q:
            if "im2col" in q:
                raise NotImplementedError("im2col")
            first = a[0]
            if first[0] == "map":                # store or reduce: [map, coords], [smem]
                s, so = self.addr(a[1], "shared")
                mp, coords = self.tmap(first)
                return self.call(f"w.tma_store({m},{mp},{coords},{s},{so},{red!r})")
            d, do = self.addr(a[0], "shared")
            mp, coords = self.tmap(a[1])
            b, bo = self.addr(a[2], "shared")
            mc = f"{self.src(a[3], 'u16')}" if "multicast::cluster" in q else "None"
            return self.call(f"w.tma_load({m},{d},{do},{mp},{coords},{b},{bo},{mc})")
        size = self.src(a[2], "u32")
        if q[-1] == "global" or "shared::cta" in q and q.index("global") < q.index("shared::cta"):
            g, go = self.addr(a[0], "global")    # smem -> global
            s, so = self.addr(a[1], "shared")
            t = q[-1] if red else "b8"
            if t not in DTYPE:
                t = next((x for x in reversed(q) if x in DTYPE), "b8")
            return self.call(f"w.bulk_store({m},{g},{go},{s},{so},{size},{red!r},'{t}')")
        d, do = self.addr(a[0], "shared")
        b, bo = self.addr(a[3], "shared")
        if q.count("shared::cta") and "global" not in q:
            s, so = self.addr(a[1], "shared")
            return self.call(f"w.bulk_s2s({m},{d},{do},{s},{so},{size},{b},{bo})")
        s, so = self.addr(a[1], "global")
        mc = f"{self.src(a[4], 'u16')}" if "multicast::cluster" in q else "None"
        return self.call(f"w.bulk_load({m},{d},{do},{s},{so},{size},{b},{bo},{mc})")

    def op_tensormap(self, i, q, a):
        """tensormap.replace.tile.FIELD and tensormap.cp_fenceproxy."""
        sp = "shared" if any(x.startswith("shared") for x in q) else "global"
        if q[1] == "cp_fenceproxy":
            d, do = self.addr(a[0], "global")
            s, so = self.addr(a[1], "shared")
            return self.call(f"w.tensormap_copy({self.m},{d},{do},{s},{so},{a[2][1]})")
        field = q[3]
        if q[1] != "replace" or field not in ("global_address", "global_dim", "global_stride"):
            raise NotImplementedError("tensormap field")
        addr, off = self.addr(a[0], sp)
        ordinal = a[1][1] if field != "global_address" else 0
        value = self.src(a[-1], "u32" if field == "global_dim" else "u64")
        self.call(f"w.tensormap_replace({self.m},'{sp}',{addr},{off},'{field}',{ordinal},{value})")

    def tmap(self, o):
        c = "[" + ",".join(self.src(x, "s32") for x in o[2]) + "]"
        return self.src(o[1], "u64"), c
