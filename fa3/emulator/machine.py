"""Executes a parsed kernel: CTAs, warpgroup units, fragments, shared memory, async engines.

A *unit* is a warpgroup (up to 128 lanes in lockstep).  A *fragment* is a set of
its lanes that share a pc; a unit starts with one and splits on divergence.
Inside a unit the runnable fragment with the lowest pc goes first and fragments
that meet at a pc merge (reconvergence).  A `.sync.aligned` instruction waits
until its whole warp (wgmma: warpgroup) has arrived.  Units are scheduled
cooperatively: each runs until all its fragments are blocked.
"""
from functools import partial

import numpy as np

from . import numerics as N
from .lower import Lower, sync_kind

RUN, WAIT, CONV, BAR, SLEEP = range(5)
STATE = {RUN: "running", WAIT: "mbarrier wait", CONV: "waiting for the rest of its warp(s)",
         BAR: "barrier", SLEEP: "pausing"}
u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
f2, f4 = np.float16, np.float32


from .errors import Deadlock, KernelError, OutOfBounds


class Checks:
    """Which optional checkers are on, and how asynchronous engines behave."""
    names = ("proxy", "uninit", "poison", "wgmma", "late", "mbarrier")

    def __init__(self, on=()):
        unknown = set(on) - set(self.names)
        assert not unknown, unknown
        for n in self.names:
            setattr(self, n, n in on)
        # proxy    generic writes read by the async proxy without the writer's fence.proxy.async
        # uninit   reads of shared memory that nothing wrote (some kernels do it on purpose and mask later)
        # poison   shared memory and registers start as NaN patterns instead of zeros
        # wgmma    registers of a wgmma in flight touched before wait_group
        # late     asynchronous work happens as late as it may: TMA loads when nothing else can run, wgmma,
        #          bulk stores and cp.async at the wait that covers them (finds missing waits and early reuse)
        # mbarrier ordinary stores over a live mbarrier


class Shared:
    """One CTA's shared memory with typed views."""

    def __init__(self, nbytes, checks):
        nbytes = (nbytes + 1023) // 1024 * 1024
        self.raw = np.full(nbytes, 0xFF if checks.poison else 0, u1)
        self.size = nbytes
        self.view = {t: self.raw.view(t) for t in (np.uint8, np.int8, np.uint16, np.int16, np.float16, np.uint32,
                                                   np.int32, np.float32, np.uint64, np.int64, np.float64)}
        self.rows16 = self.raw.view(u8).reshape(-1, 2)      # 16-byte chunks
        self.bars = {}
        self.written = np.zeros(nbytes // 4, bool) if checks.uninit else None
        if checks.proxy:
            self.wtime = np.zeros(nbytes // 4, np.int64)    # when a word was last written generically
            self.wlane = np.zeros(nbytes // 4, np.int32)    # and by which thread


class MBar:
    __slots__ = ("count", "pending", "tx", "phase", "line")

    def __init__(self, count):
        self.count = self.pending = count
        self.tx, self.phase = 0, 0

    def settle(self):
        if self.pending == 0 and self.tx == 0:
            self.phase += 1
            self.pending = self.count
            return True
        return False


class Frag:
    __slots__ = ("pc", "mask", "state", "wait", "timeout", "key")

    def __init__(self, pc, mask):
        self.pc, self.mask, self.state, self.wait, self.timeout = pc, mask, RUN, None, False


# ---- address swizzles -----------------------------------------------------------
_SWZ = {0: 0, 1: 1, 2: 3, 3: 7}         # tensor-map swizzle (none, 32B, 64B, 128B) -> xor mask on 16B chunks
_DESC_SWZ = {0: 0, 3: 1, 2: 3, 1: 7}    # wgmma descriptor layout type -> the same


def swizzle_bytes(addr, mask):
    return addr ^ (((addr >> 7) & mask) << 4) if mask else addr


_operand_cache = {}


def operand_index(desc, rows, k, es, mn_major):
    """Element indices into shared memory of a wgmma matrix operand: array (rows, k)."""
    key = (desc, rows, k, es, mn_major)
    idx = _operand_cache.get(key)
    if idx is not None:
        return idx
    start = (desc & 0x3FFF) << 4
    lbo, sbo = ((desc >> 16) & 0x3FFF) << 4, ((desc >> 32) & 0x3FFF) << 4
    if (desc >> 49) & 7:
        raise KernelError(f"wgmma descriptor {desc:#x}: base offset is not emulated")
    mask = _DESC_SWZ[(desc >> 62) & 3]
    span = 16 * (mask + 1)              # bytes of one swizzled row
    r, c = np.arange(rows)[:, None], np.arange(k)[None, :]
    if not mn_major:
        kb = c * es
        if mask:
            off = (r // 8) * sbo + (r % 8) * span + kb
        else:
            off = (r // 8) * sbo + (r % 8) * 16 + (kb // 16) * lbo + kb % 16
    else:
        mb = r * es
        if mask:
            off = (mb // span) * lbo + mb % span + (c % 8) * span + (c // 8) * sbo
        else:
            off = (mb // 16) * sbo + mb % 16 + (c % 8) * 16 + (c // 8) * lbo
    addr = swizzle_bytes(start + off, mask)
    idx = (addr // es).astype(np.intp)
    _operand_cache[key] = idx
    return idx


_ELEM = {"f16": (2, f2), "bf16": (2, u2), "e4m3": (1, u1), "e5m2": (1, u1), "tf32": (4, f4), "s8": (1, np.int8),
         "u8": (1, u1)}


def decode(x, t):
    if t == "f16":
        return x.astype(f4)
    if t == "bf16":
        return N.bf16_to_f32(x)
    if t in N.FP8:
        return N.FP8[t][x]
    return x.astype(f4)


class CTA:
    def __init__(self, grid, rank, ctaid, checks):
        self.grid, self.rank, self.ctaid = grid, rank, ctaid
        self.smem = Shared(grid.smem_bytes, checks)
        self.bars = {}                  # named barriers: id -> [arrived, waiting fragments, expected]
        self.threads = grid.nthreads
        self.live = grid.nthreads
        self.units = [Unit(self, i) for i in range((grid.nthreads + 127) // 128)]


class Unit:
    """A warpgroup.  Methods without an underscore are called by generated code."""

    def __init__(self, cta, index):
        self.cta, self.grid, self.index = cta, cta.grid, index
        self.checks = self.grid.checks
        n = min(128, self.grid.nthreads - 128 * index)
        self.L = L = (n + 31) // 32 * 32
        c = self.grid.kernel.counts
        self.W = np.full((c.get("w", 0), L), 0xFFFFFFFF if self.checks.poison else 0, u4)
        w64, w16 = np.zeros((c.get("d", 0), L), u8), np.zeros((c.get("h", 0), L), u2)
        self.WF = self.W.view(f4)
        self.U, self.S, self.F = list(self.W), list(self.W.view(np.int32)), list(self.WF)
        self.D, self.Q, self.E = list(w64), list(w64.view(np.int64)), list(w64.view(np.float64))
        self.H, self.J, self.G = list(w16), list(w16.view(np.int16)), list(w16.view(f2))
        self.P = list(np.zeros((c.get("p", 0), L), bool))
        self.ones, self.zeros = b"\1" * L, b"\0" * L
        self.all = np.ones(L, bool)
        self.live = np.arange(L) < n
        self.lane0 = 128 * index
        self.params = self.grid.params
        self.sp = self._specials()
        self.frags = [Frag(0, self.live.copy())]
        self.steps = self.instrs = 0
        self.cluster_gen = np.zeros(L, np.int64)
        self.pending = []               # wgmma accumulator registers in flight: list of groups (sets)
        self.open_group = set()
        self.a_pending, self.a_open = [], set()
        self.mma_open, self.mma_groups = [], []     # late mode: work not yet committed / waited for
        self.bulk_open, self.bulk_groups = {}, {}   # by lane
        self.cp_open, self.cp_groups = {}, {}       # by warp
        self.lanes = np.arange(L)
        self.fence_time = np.zeros(L, np.int64)

    def _specials(self):
        g, L = self.grid, self.L
        t = np.arange(L, dtype=u4) + u4(self.lane0)
        bx, by, bz = g.block
        one = lambda v: np.full(L, v, u4)
        s = {"%tid.x": t % u4(bx), "%tid.y": t // u4(bx) % u4(by), "%tid.z": t // u4(bx * by),
             "%laneid": t & u4(31), "%warpid": t >> u4(5), "%nwarpid": one((g.nthreads + 31) // 32),
             "%smid": one(self.cta.ctaid[3] % 132), "%nsmid": one(132), "%gridid": one(1),
             "%dynamic_smem_size": one(g.dynamic_smem), "%total_smem_size": one(g.smem_bytes),
             "%cluster_ctarank": one(self.cta.rank), "%cluster_nctarank": one(int(np.prod(g.cluster))),
             "%is_explicit_cluster": one(int(np.prod(g.cluster)) > 1)}
        for i, ax in enumerate("xyz"):
            c, cl = self.cta.ctaid[i], g.cluster[i]
            s.update({f"%ntid.{ax}": one(g.block[i]), f"%ctaid.{ax}": one(c), f"%nctaid.{ax}": one(g.dims[i]),
                      f"%clusterid.{ax}": one(c // cl), f"%nclusterid.{ax}": one(g.dims[i] // cl),
                      f"%cluster_ctaid.{ax}": one(c % cl), f"%cluster_nctaid.{ax}": one(cl)})
        lane = t & u4(31)
        s["%lanemask_lt"] = ((u8(1) << lane.astype(u8)) - u8(1)).astype(u4)
        s["%lanemask_eq"] = (u8(1) << lane.astype(u8)).astype(u4)
        s["%lanemask_le"] = s["%lanemask_lt"] | s["%lanemask_eq"]
        s["%lanemask_gt"] = ~s["%lanemask_le"]
        s["%lanemask_ge"] = ~s["%lanemask_lt"]
        return s

    def clock(self, dt):
        self.grid.ticks += 100
        return np.full(self.L, self.grid.ticks, np.uint64).astype(dt)

    # ---- scheduling ----------------------------------------------------------------
    def run(self, budget=20000):
        """Run until every fragment is blocked; True if anything executed."""
        ran = False
        kinds, segment = self.grid.kinds, self.grid.lower.segment
        check = self.checks.wgmma
        while True:
            fr, limit = None, 1 << 30
            for f in self.frags:
                if f.state == WAIT and f.wait():
                    f.state = RUN
                if f.state == RUN and (fr is None or f.pc < fr.pc):
                    fr = f
            if fr is None:
                return ran
            if len(self.frags) > 1:
                for f in list(self.frags):
                    if f is fr or f.state not in (RUN, CONV):
                        continue
                    if f.pc == fr.pc:                   # reconverge
                        fr.mask = fr.mask | f.mask
                        self.frags.remove(f)
                    elif fr.pc < f.pc < limit:
                        limit = f.pc
            ran = True
            whole = fr.mask.tobytes() == self.ones
            pc = fr.pc
            while True:
                if not whole:
                    kind = kinds[pc] if pc < len(kinds) else None
                    if kind and not self._converged(fr, pc, kind):
                        break
                fn, n, touched, written = segment(pc, whole)
                if check and touched and (self.pending or self.open_group):
                    self._check_in_flight(touched, written, pc)
                self.instrs += n
                self.steps += 1
                self.pc = pc
                nxt = fn(self, fr)
                if nxt < 0:
                    break
                fr.pc = pc = nxt
                if pc >= limit:
                    break
                budget -= 1
                if budget <= 0:
                    return True

    def _converged(self, fr, pc, kind):
        """Hold back warps of fr that are not complete; True if fr may go on at once."""
        fr.pc = pc
        if kind == "wg":
            if (fr.mask == self.live).all():
                return True
            fr.state = CONV
            return False
        m = fr.mask.reshape(-1, 32)
        ok = (m == self.live.reshape(-1, 32)).all(1)
        bad = m.any(1) & ~ok
        if not bad.any():
            return True
        keep = np.repeat(bad, 32) & fr.mask
        rest = fr.mask & ~keep
        fr.mask, fr.state = keep, CONV
        if rest.any():
            self.frags.append(Frag(pc, rest))
        return False

    def split(self, fr, pred, a, b):
        """Lanes with pred go to a, the others to b."""
        t = fr.mask & pred
        other = fr.mask & ~pred
        fr.mask, fr.pc = t, a
        self.frags.append(Frag(b, other))
        return -1

    def branch(self, fr, pred, a, b):
        t = (fr.mask & pred)
        if t.tobytes() == fr.mask.tobytes():
            return a
        if t.tobytes() == self.zeros:
            return b
        return self.split(fr, pred, a, b)

    def guard(self, fr, pred, neg, pc, nxt):
        """Predicated terminator: lanes that do not execute it skip to nxt."""
        p = ~pred if neg else pred
        t = fr.mask & p
        if not t.any():
            return nxt
        if (t == fr.mask).all():
            return None
        other = fr.mask & ~p
        fr.mask, fr.pc = t, pc
        self.frags.append(Frag(nxt, other))
        return -1

    def exit(self, fr):
        n = int(fr.mask.sum())
        if self.checks.late:
            self.bulk_commit(fr.mask)
            self.bulk_wait(fr.mask, 0, False)
        self.live = self.live & ~fr.mask
        self.frags.remove(fr)
        self.cta.live -= n
        self.grid.events += 1
        for ident in list(self.cta.bars):
            self._release(ident)
        self.grid.cluster_settle()
        for f in self.frags:            # a warp may be complete now
            if f.state == CONV:
                f.state = RUN
        return -1

    def pause(self, fr, nxt):
        fr.pc = nxt
        self._block(fr, lambda: fr.timeout, SLEEP)
        return -1

    def trap(self, line):
        raise KernelError(f"trap executed at PTX line {line}")

    def _block(self, fr, ready, what=WAIT):
        fr.state, fr.wait, fr.timeout, fr.key = WAIT, ready, False, what

    # ---- integer helpers ---------------------------------------------------------
    def half_op(self, f, t, *x):
        if t in ("f16", "bf16"):
            if t == "f16":
                return f(*(v.view(f2) if v.dtype == u2 else v for v in x)).astype(f2)
            return N.f32_to_bf16(f(*(N.bf16_to_f32(v) for v in x)))
        kind = t[:-2]
        parts = [N.halves(v, kind) for v in x]
        return N.unhalves(f(*(p[0] for p in parts)), f(*(p[1] for p in parts)), kind)

    def half_fma(self, t, a, b, c, relu):
        if t in ("f16", "bf16"):
            dec = (lambda v: v.astype(f4)) if t == "f16" else N.bf16_to_f32
            r = dec(a) * dec(b) + dec(c)
            r = np.maximum(r, f4(0)) if relu else r
            return r.astype(f2) if t == "f16" else N.f32_to_bf16(r)
        kind = t[:-2]
        (al, ah), (bl, bh), (cl, ch) = (N.halves(v, kind) for v in (a, b, c))
        r = [x.astype(f4) * y.astype(f4) + z.astype(f4) for x, y, z in ((al, bl, cl), (ah, bh, ch))]
        if relu:
            r = [np.maximum(v, f4(0)) for v in r]
        return N.unhalves(r[0], r[1], kind)

    def mulhi(self, a, b):
        if a.dtype.itemsize == 4:
            wide = np.int64 if a.dtype.kind == "i" else u8
            return (a.astype(wide) * b.astype(wide) >> wide(32)).astype(a.dtype)
        n = 1 << 64
        return np.array([(int(x) * int(y) >> 64) % n for x, y in zip(*np.broadcast_arrays(a, b))], u8).view(a.dtype)

    def idiv(self, a, b):
        b = np.where(b == 0, b.dtype.type(1), b)
        if a.dtype.kind == "u":
            return a // b
        if a.dtype.itemsize <= 4:
            return np.trunc(a.astype(np.float64) / b).astype(a.dtype)
        q = np.abs(a) // np.abs(b)
        return np.where((a < 0) ^ (b < 0), -q, q)

    def shf(self, lo, hi, n, left, wrap):
        n = (n & u4(31)) if wrap else np.minimum(n, u4(32))
        x = lo.astype(u8) | (hi.astype(u8) << u8(32))
        n = n.astype(u8)
        return ((x << n) >> u8(32)).astype(u4) if left else (x >> n).astype(u4)

    def bfe(self, a, pos, n):
        bits = 8 * a.dtype.itemsize
        pos, n = np.broadcast_arrays(pos & u4(255), n & u4(255))
        x = a.astype(np.int64) if a.dtype.kind == "i" else a.astype(u8)
        n = np.minimum(n, u4(bits)).astype(x.dtype)
        pos = np.minimum(pos, u4(63)).astype(x.dtype)
        if a.dtype.kind == "i":
            up = np.maximum(np.int64(64) - pos - n, 0)
            return np.where(n == 0, 0, (x << up) >> np.minimum(up + pos, 63)).astype(a.dtype)
        mask = np.where(n >= u8(64), ~u8(0), (u8(1) << n) - u8(1))
        return ((x >> pos) & mask).astype(a.dtype)

    def bfi(self, a, b, pos, n):
        bits = 8 * b.dtype.itemsize
        pos, n = (pos & u4(255)).astype(u8), np.minimum(n & u4(255), u4(bits)).astype(u8)
        mask = (((u8(1) << n) - u8(1)) << pos).astype(b.dtype)
        return (b & ~mask) | ((a.astype(u8) << pos).astype(b.dtype) & mask)

    def dot(self, a, b, c, width, first):
        """dp2a (width 2: halves of a by bytes of b from `first`) and dp4a (width 1)."""
        a, b, c = (np.ascontiguousarray(N.rows(x, self.L)) for x in (a, b, c))
        x = a.view(f"{a.dtype.kind}{width}").reshape(self.L, -1).astype(np.int64)
        y = b.view(f"{b.dtype.kind}1").reshape(self.L, 4).astype(np.int64)[:, first:first + x.shape[1]]
        return ((x * y).sum(1) + c).astype(c.dtype)

    def lop3(self, a, b, c, lut):
        r = np.zeros(self.L, u4)
        for i in range(8):
            if lut >> i & 1:
                r |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return r

    def prmt(self, a, b, sel):
        x = a.astype(u8) | (b.astype(u8) << u8(32))
        r = np.zeros(self.L, u4)
        for j in range(4):
            s = (sel >> u4(4 * j)) & u4(15)
            byte = (x >> (u8(8) * (s & u4(7)).astype(u8))).astype(u4) & u4(255)
            byte = np.where(s & u4(8), np.where(byte & u4(128), u4(255), u4(0)), byte)
            r |= byte << u4(8 * j)
        return r

    def clz(self, a):
        bits = 8 * a.dtype.itemsize
        x = a.astype(u8)
        for s in (1, 2, 4, 8, 16, 32):
            x = x | (x >> u8(s))
        return (bits - np.bitwise_count(x).astype(np.int64)).astype(u4)

    def brev(self, a):
        b = np.ascontiguousarray(np.broadcast_to(a, (self.L,))).view(u1).reshape(-1, 4)
        bits = np.unpackbits(b, axis=1, bitorder="little")[:, ::-1]
        return np.packbits(np.ascontiguousarray(bits), axis=1, bitorder="little").view(u4)[:, 0]

    # ---- warp communication -----------------------------------------------------
    def elect(self, m):
        m2 = (self.live if m is None else m).reshape(-1, 32)
        first = m2.argmax(1)
        p = np.zeros_like(m2)
        p[np.arange(len(m2)), first] = True
        return p.reshape(-1) & (self.all if m is None else m), np.repeat(first.astype(u4), 32)

    def shfl(self, mode, a, b, c):
        src, ok = Lower.shuffle(mode, N.rows(b, self.L), N.rows(c, self.L), self.L)
        return N.rows(a, self.L)[src], ok

    def vote(self, m, mode, p):
        act = (self.live if m is None else m).reshape(-1, 32)
        p = N.rows(p, self.L).reshape(-1, 32)
        if mode == "ballot":
            v = ((p & act).astype(u8) << np.arange(32, dtype=u8)).sum(1).astype(u4)
        elif mode == "any":
            v = (p & act).any(1)
        elif mode == "all":
            v = (p | ~act).all(1)
        else:
            v = (p | ~act).all(1) | ~(p & act).any(1)
        return np.repeat(v, 32)

    def match_any(self, m, a):
        act = (self.live if m is None else m).reshape(-1, 32)
        x = N.rows(a, self.L).reshape(-1, 32)
        eq = (x[:, :, None] == x[:, None, :]) & act[:, None, :]
        return (eq.astype(u8) << np.arange(32, dtype=u8)).sum(2).astype(u4).reshape(-1)

    def redux(self, m, op, a):
        act = (self.live if m is None else m).reshape(-1, 32)
        x = N.rows(a, self.L).reshape(-1, 32)
        f, idn = {"add": (np.add, 0), "min": (np.minimum, None), "max": (np.maximum, None), "or": (np.bitwise_or, 0),
                  "and": (np.bitwise_and, ~x.dtype.type(0)), "xor": (np.bitwise_xor, 0)}[op]
        if idn is None:
            idn = np.iinfo(x.dtype).max if op == "min" else np.iinfo(x.dtype).min
        return np.repeat(f.reduce(np.where(act, x, x.dtype.type(idn)), axis=1, dtype=x.dtype), 32)

    # ---- shared memory --------------------------------------------------------------
    def _active(self, x, m):
        x = N.rows(x, self.L)
        return x[m] if m is not None else x

    def _shared(self, m, addr, off, nbytes):
        """(Shared, byte offsets of active lanes), after bounds and alignment checks."""
        a = self._active(addr, m).astype(np.int64) + off
        if a.size == 0:
            return self.cta.smem, a
        sm = self.cta.smem
        top = a >> 24
        if top.any():
            if (top != top[0]).any():
                raise NotImplementedError("lanes addressing different CTAs in one instruction")
            sm = self.grid.peer(int(top[0]))
            a = a & 0xFFFFFF
        if (a & (nbytes - 1)).any():
            self._fault(f"misaligned {nbytes}-byte shared access at {hex(int(a[(a & (nbytes - 1)) != 0][0]))}")
        if a.max() + nbytes > self.grid.smem_bytes or a.min() < 0:
            self._fault(f"shared access at {int(a.max()):#x} outside the CTA's {self.grid.smem_bytes:#x} bytes")
        return sm, a

    def _fault(self, text):
        raise KernelError(text)

    def _reads(self, sm, a, nbytes):
        if sm.written is not None:
            for b in range(0, nbytes, 4):
                if not sm.written[(a + b) >> 2].all():
                    bad = a[~sm.written[(a + b) >> 2]][0]
                    self._fault(f"uninitialised shared memory read at {int(bad):#x}")

    def _writes(self, sm, m, a, nbytes):
        """Bookkeeping for generic-proxy writes."""
        ck = self.checks
        if sm.written is not None:
            for b in range(0, nbytes, 4):
                sm.written[(a + b) >> 2] = True
        if ck.proxy:
            self.grid.now += 1
            lanes = (self.lanes if m is None else self.lanes[m]) + self.lane0 + self.cta.rank * 1024
            for b in range(0, nbytes, 4):
                sm.wtime[(a + b) >> 2] = self.grid.now
                sm.wlane[(a + b) >> 2] = lanes
        if ck.mbarrier and sm.bars:
            hit = sm.bars.keys() & set((a & ~7).tolist())
            if hit:
                self._fault(f"ordinary store over the mbarrier at {min(hit):#x}")

    def _async_reads(self, sm, words, what):
        """The async proxy reads these 4-byte words: generic writes must be fenced by their writers."""
        if sm.written is not None and not sm.written[words].all():
            self._fault(f"{what} reads uninitialised shared memory at {int(words[~sm.written[words]][0]) * 4:#x}")
        if self.checks.proxy:
            t = sm.wtime[words]
            bad = t > self.grid.fences[sm.wlane[words]]
            if bad.any():
                w = words[bad][0]
                self._fault(f"{what} reads shared memory at {int(w) * 4:#x} written through the generic proxy by "
                            f"thread {int(sm.wlane[w]) % 1024} without a fence.proxy.async since")

    def fence_async(self, m):
        if self.checks.proxy:
            lanes = (self.lanes if m is None else self.lanes[m]) + self.lane0 + self.cta.rank * 1024
            self.grid.fences[lanes] = self.grid.now

    def ld_shared(self, m, dt, rows, addr, off):
        es = np.dtype(dt).itemsize
        n = es * len(rows)
        sm, a = self._shared(m, addr, off, n)
        if self.checks.uninit:
            self._reads(sm, a, n)
        idx, arr = a // es, sm.view[dt]
        for i, d in enumerate(rows):
            if d is None:
                continue
            if m is None:
                d[:] = arr[idx + i]
            else:
                d[m] = arr[idx + i]

    def st_shared(self, m, dt, rows, addr, off):
        es = np.dtype(dt).itemsize
        n = es * len(rows)
        sm, a = self._shared(m, addr, off, n)
        self._writes(sm, m, a, n)
        idx, arr = a // es, sm.view[dt]
        for i, s in enumerate(rows):
            arr[idx + i] = self._active(s, m)

    def st_async(self, m, dt, rows, addr, off, mb, mo):
        self.st_shared(m, dt, rows, addr, off)
        n = np.dtype(dt).itemsize * len(rows)
        for b in (self._active(mb, m).astype(np.int64) + mo).tolist():
            self._tx(b, -n)

    def _matrix_rows(self, m, addr, off, n):
        """16-byte row addresses (warps, n, 8) of complete warps and the warps' indices."""
        warps = np.arange(self.L // 32) if m is None else np.flatnonzero(m.reshape(-1, 32).any(1))
        a = N.rows(addr, self.L).reshape(-1, 32)[warps, :8 * n].astype(np.int64) + off
        if (a & 15).any():
            self._fault(f"misaligned ldmatrix/stmatrix row address {hex(int(a[(a & 15) != 0][0]))}")
        if a.max() + 16 > self.grid.smem_bytes:
            self._fault(f"ldmatrix/stmatrix row at {int(a.max()):#x} outside shared memory")
        return warps, a.reshape(len(warps), n, 8)

    def ldmatrix(self, m, rows, addr, off, trans):
        n, sm = len(rows), self.cta.smem
        warps, a = self._matrix_rows(m, addr, off, n)
        if self.checks.uninit:
            self._reads(sm, a.ravel(), 16)
        x = sm.rows16[a >> 4].view(u2)                      # (warps, n, 8, 8)
        if trans:
            x = np.ascontiguousarray(x.swapaxes(2, 3))
        x = x.view(u4).reshape(len(warps), n, 32)
        for i, d in enumerate(rows):
            d.reshape(-1, 32)[warps] = x[:, i]

    def stmatrix(self, m, rows, addr, off, trans):
        n, sm = len(rows), self.cta.smem
        warps, a = self._matrix_rows(m, addr, off, n)
        x = np.stack([N.rows(r, self.L).reshape(-1, 32)[warps] for r in rows], 1)
        x = np.ascontiguousarray(x).view(u2).reshape(len(warps), n, 8, 8)
        if trans:
            x = np.ascontiguousarray(x.swapaxes(2, 3))
        sm.rows16[a >> 4] = x.view(u8).reshape(len(warps), n, 8, 2)
        if sm.written is not None:
            for b in range(0, 16, 4):
                sm.written[(a + b) >> 2] = True
        if self.checks.proxy:
            # lane 4r+c wrote word c of row r in every matrix
            self.grid.now += 1
            lane = (warps[:, None, None] * 32 + self.lane0 + self.cta.rank * 1024
                    + np.arange(8)[None, None, :] * 4) + np.zeros((1, n, 1), int)
            for c in range(4):
                sm.wtime[(a + 4 * c) >> 2] = self.grid.now
                sm.wlane[(a + 4 * c) >> 2] = lane + c

    # ---- global and generic memory -----------------------------------------------
    def _global(self, m, dt, addr, off, n, what):
        """(array, element indices of active lanes); None, addresses if they span regions."""
        a = self._active(addr, m)
        a = a.astype(np.int64) + off
        lo, hi = int(a.min()), int(a.max())
        if (a & (n - 1)).any():
            self._fault(f"misaligned {n}-byte global {what}")
        try:
            reg = self.grid.memory.find(lo, hi + n, what)
        except OutOfBounds:
            if lo == hi:
                raise
            return None, a
        return reg.view(dt), (a - reg.start) // np.dtype(dt).itemsize

    def _generic(self, m, addr):
        """Shared-window test for generic addresses."""
        if addr.dtype.itemsize != 8:
            return None
        a = self._active(addr, m)
        return int(a[0] >> u8(56)) if a.size else None

    def ld_global(self, m, dt, rows, addr, off):
        if m is not None and not m.any():
            return
        win = self._generic(m, addr)
        if win == 1:
            return self.ld_shared(m, dt, rows, (addr & u8(0xFFFFFFFF)).astype(u4), off)
        es = np.dtype(dt).itemsize
        if win == 2:
            arr = self.params[:len(self.params) // es * es].view(dt)
            idx = ((self._active(addr, m) & u8(0xFFFFFFFF)).astype(np.int64) + off) // es
        else:
            arr, idx = self._global(m, dt, addr, off, es * len(rows), "read")
        sel = slice(None) if m is None else m
        for i, d in enumerate(rows):
            if d is None:
                continue
            if arr is None:
                vals = []
                for x in idx.tolist():
                    x += i * es
                    try:
                        reg = self.grid.memory.find(x, x + es, "read"); base, views = reg.start, {np.dtype(u1): reg.bytes}
                    except OutOfBounds as e:
                        raise KernelError(str(e)) from None
                    vals.append(reg.view(dt)[(x - base) // es])
                d[sel] = np.array(vals, dt)
            else:
                d[sel] = arr[idx + i]

    def st_global(self, m, dt, rows, addr, off):
        if m is not None and not m.any():
            return
        if self._generic(m, addr) == 1:
            return self.st_shared(m, dt, rows, (addr & u8(0xFFFFFFFF)).astype(u4), off)
        es = np.dtype(dt).itemsize
        arr, idx = self._global(m, dt, addr, off, es * len(rows), "write")
        self.grid.events += 1
        for i, s in enumerate(rows):
            v = self._active(s, m)
            if arr is None:
                for x, y in zip(idx.tolist(), v):
                    x += i * es
                    try:
                        reg = self.grid.memory.find(x, x + es, "write"); base, views = reg.start, {np.dtype(u1): reg.bytes}
                    except OutOfBounds as e:
                        raise KernelError(str(e)) from None
                    reg.view(dt)[(x - base) // es] = y
            else:
                arr[idx + i] = v

    def atomic(self, m, space, op, t, dt, d, addr, off, b, c):
        if m is not None and not m.any():
            return
        es = np.dtype(dt).itemsize
        if space == "global" and self._generic(m, addr) == 1:
            space, addr = "shared", (addr & u8(0xFFFFFFFF)).astype(u4)
        if space == "shared":
            sm, a = self._shared(m, addr, off, es)
            arr, idx = sm.view[dt], a // es
            self._writes(sm, m, a, es)
        else:
            arr, idx = self._global(m, dt, addr, off, es, "atomic")
            if arr is None:
                raise KernelError("atomic lanes spanning tensors")
        b = self._active(b, m)
        self.grid.events += 1
        if d is None and op == "add" and t not in ("bf16x2", "f16x2", "bf16", "f16"):
            return np.add.at(arr, idx, b)
        old = np.empty(len(idx), dt)
        c = self._active(c, m) if c is not None else None
        for i, j in enumerate(idx.tolist()):        # lane order is one legal order
            v = arr[j]
            old[i] = v
            x = b[i]
            if op == "cas":
                arr[j] = c[i] if v == x else v
            elif op in ("inc", "dec"):
                arr[j] = (0 if v >= x else v + 1) if op == "inc" else (x if v == 0 or v > x else v - 1)
            elif op == "exch":
                arr[j] = x
            elif t.endswith("x2") or t in ("bf16", "f16"):
                arr[j] = self.half_op(np.add, t, np.array([v], dt), np.array([x], dt))[0]
            else:
                arr[j] = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
                          "or": np.bitwise_or, "xor": np.bitwise_xor}[op](v, x)
        if d is not None:
            d[slice(None) if m is None else m] = old

    # ---- mbarriers -------------------------------------------------------------------
    def _bar(self, a):
        sm = self.cta.smem if a >> 24 == 0 else self.grid.peer(a >> 24)
        b = sm.bars.get(a & 0xFFFFFF)
        if b is None:
            self._fault(f"operation on an mbarrier that was not initialised: shared address {a & 0xFFFFFF:#x}")
        return b

    def _tx(self, a, n):
        b = self._bar(a)
        b.tx += n
        if abs(b.tx) >= 1 << 20:
            self._fault(f"mbarrier at {a:#x}: transaction count out of range")
        b.settle()
        self.grid.events += 1

    def mbar_init(self, m, addr, off, n):
        a = (self._active(addr, m).astype(np.int64) + off).tolist()
        if n is not None:
            n = self._active(n, m).tolist()
        for i, x in enumerate(a):
            if x & 7:
                self._fault(f"mbarrier at {x:#x} is not 8-byte aligned")
            if n is None:
                self.cta.smem.bars.pop(x, None)
            else:
                if not 1 <= n[i] < 1 << 20:
                    self._fault(f"mbarrier.init count {n[i]}")
                self.cta.smem.bars[x] = MBar(n[i])
                if self.cta.smem.written is not None:
                    self.cta.smem.written[[x >> 2, (x >> 2) + 1]] = True

    def mbar_tx(self, m, addr, off, n, sign):
        n = self._active(n, m).tolist()
        for x, k in zip((self._active(addr, m).astype(np.int64) + off).tolist(), n):
            self._tx(x, sign * k)

    def mbar_arrive(self, m, row, addr, off, x, expect):
        a = (self._active(addr, m).astype(np.int64) + off).tolist()
        x = self._active(x, m).tolist() if x is not None else [1] * len(a)
        tokens = []
        for i, p in enumerate(a):
            b = self._bar(p)
            tokens.append(b.phase)
            n = 1
            if expect:
                b.tx += x[i]
            else:
                n = x[i]
            if n > b.pending:
                self._fault(f"mbarrier at {p:#x}: more arrivals than its count of {b.count} in one phase")
            b.pending -= n
            b.settle()
        self.grid.events += 1
        if row is not None:
            row[slice(None) if m is None else m] = np.array(tokens, u8)

    def wait_mbarrier(self, fr, row, addr, off, x, parity, blocking, pc, nxt):
        m = fr.mask
        a = (self._active(addr, m).astype(np.int64) + off)
        x = self._active(x, m)
        if a.size > 1 and ((a != a[0]).any() or (x != x[0]).any()):
            done = np.array([self._done(int(p), int(v), parity) for p, v in zip(a, x)])
            p0, v0 = a[~done][:1], x[~done][:1]
        else:
            p0, v0 = a[:1], x[:1]
            done = np.full(len(a), self._done(int(a[0]), int(x[0]), parity))
        if done.all() or not blocking or fr.timeout:
            row[m] = done
            timed_out, fr.timeout = fr.timeout, False
            if not done.all() and not timed_out:    # a failed poll lets others run
                fr.pc = nxt
                self._block(fr, lambda: fr.timeout, SLEEP)
                return -1
            return nxt
        fr.pc = pc
        bar, v = self._bar(int(p0[0])), int(v0[0])
        done1 = (lambda: fr.timeout or (bar.phase & 1) != v) if parity else (lambda: fr.timeout or bar.phase > v)
        self._block(fr, done1)
        fr.key = ("mbarrier", int(p0[0]), v, bar)
        return -1

    def _done(self, a, v, parity):
        b = self._bar(a)
        return (b.phase & 1) != (v & 1) if parity else b.phase > v

    # ---- named barriers ------------------------------------------------------------
    def barrier(self, fr, ident, count, arrive, pc, nxt):
        m = fr.mask
        ids = self._active(ident, m)
        if (ids != ids[0]).any():           # warps naming different barriers
            t = N.rows(ident, self.L) == ids[0]
            return self.split(fr, t, pc, pc)
        i = int(ids[0])
        if i > 15:
            self._fault(f"named barrier {i}")
        warps = int(m.reshape(-1, 32).any(1).sum())
        b = self.cta.bars.setdefault(i, [0, [], None])
        want = None if count is None else int(self._active(count, m)[0])
        if want is not None and want % 32:
            self._fault(f"barrier {i}: thread count {want} is not a multiple of the warp size")
        if b[0] and b[2] != want:
            self._fault(f"barrier {i}: participants disagree on the thread count ({b[2]} and {want})")
        b[2] = want
        b[0] += 32 * warps
        self.grid.events += 1
        if not arrive:
            fr.pc, fr.state, fr.key = nxt, BAR, ("barrier", i, b)
            b[1].append(fr)
        self._release(i)
        if arrive:
            return nxt
        return -1 if fr.state == BAR or fr not in self.frags else nxt

    def _release(self, i):
        b = self.cta.bars[i]
        want = b[2] if b[2] is not None else (self.cta.live + 31) // 32 * 32
        if b[0] and b[0] > want:
            self._fault(f"barrier {i}: {b[0]} threads arrived where {want} were expected")
        if b[0] and b[0] == want:
            for f in b[1]:
                f.state = RUN
            self.cta.bars[i] = [0, [], None]

    def cluster_arrive(self, fr, pc, nxt):
        g = self.grid
        self.cluster_gen[fr.mask] = g.cluster_gen
        g.cluster_count += int(fr.mask.sum())
        g.events += 1
        g.cluster_settle()
        return nxt

    def cluster_wait(self, fr, pc, nxt):
        g = self.grid
        gen = int(self.cluster_gen[fr.mask].max())
        if g.cluster_gen > gen:
            return nxt
        fr.pc = pc
        self._block(fr, lambda: g.cluster_gen > gen)
        fr.key = ("cluster barrier",)
        return -1

    # ---- cp.async (Ampere): completes at once ---------------------------------------
    def cp_async(self, m, size, d, do, s, so, src_size):
        if m is not None and not m.any():
            return
        if not self.checks.late:
            return self._cp_async(m, size, d, do, s, so, src_size)
        copies = [N.rows(x, self.L).copy() if x is not None else None for x in (d, s, src_size)]
        m2 = (self.live if m is None else m).reshape(-1, 32)
        for w in np.flatnonzero(m2.any(1)).tolist():
            mw = np.zeros_like(m2)
            mw[w] = m2[w]
            self.cp_open.setdefault(w, []).append(
                partial(self._cp_async, mw.reshape(-1), size, copies[0], do, copies[1], so, copies[2]))

    def _cp_async(self, m, size, d, do, s, so, src_size):
        sm, a = self._shared(m, d, do, size)
        g = self._active(s, m).astype(np.int64) + so
        n = self._active(src_size, m).astype(np.int64) if src_size is not None else np.full(len(a), size)
        self._writes(sm, m, a, size)
        out = np.zeros((len(a), size), u1)
        ok = n > 0
        if ok.any():
            gk, nk = g[ok], n[ok]
            try:
                reg = self.grid.memory.find(int(gk.min()), int((gk + nk).max()), "cp.async read"); base, views = reg.start, {np.dtype(u1): reg.bytes}
            except OutOfBounds as e:
                raise KernelError(str(e)) from None
            gk = gk - base
            if (nk == size).all() and not (gk % size).any():
                raw = views[np.dtype(u1)]
                out[ok] = raw[:len(raw) // size * size].reshape(-1, size)[gk // size]
            else:
                for j, k, c in zip(np.flatnonzero(ok), gk.tolist(), nk.tolist()):
                    out[j, :c] = views[np.dtype(u1)][k:k + c]
        sm.raw[:sm.size // size * size].reshape(-1, size)[a // size] = out

    def _warps(self, m):
        return np.flatnonzero((self.live if m is None else m).reshape(-1, 32).any(1)).tolist()

    def cpasync_commit(self, m):
        if self.checks.late:
            for w in self._warps(m):
                self.cp_groups.setdefault(w, []).append(self.cp_open.pop(w, []))

    def cpasync_wait(self, m, n):
        """n is None for wait_all."""
        if self.checks.late:
            for w in self._warps(m):
                if n is None:
                    self.cp_groups.setdefault(w, []).append(self.cp_open.pop(w, []))
                self._drain(self.cp_groups, w, n or 0)

    @staticmethod
    def _drain(groups, key, keep):
        g = groups.get(key, [])
        done = g[:len(g) - keep] if keep else g[:]
        del g[:len(done)]
        for group in done:
            for work in group:
                work()

    def cpasync_mbar_arrive(self, m, addr, off, noinc):
        if self.checks.late:                # arrives when this thread's copies are complete
            for w in self._warps(m):
                for work in self.cp_open.pop(w, []):
                    work()
                self._drain(self.cp_groups, w, 0)
        if noinc:                           # without .noinc the count goes up first: no net change
            self.mbar_arrive(m, None, addr, off, None, False)

    # ---- TMA ------------------------------------------------------------------------
    def _lanes(self, m):
        return np.flatnonzero(self.live if m is None else m).tolist()

    def _at(self, x, lane):
        return int(x[lane] if len(x) > 1 else x[0])

    def tma_load(self, m, d, do, mp, coords, bar, bo, multicast):
        for l in self._lanes(m):
            desc = self.grid.tensormap(self._at(mp, l))
            c = [self._at(x, l) for x in coords]
            dst, mb = self._at(d, l) + do, self._at(bar, l) + bo
            targets = None if multicast is None else self._at(multicast, l)
            self._bar(mb)
            self.grid.asynchronously(partial(self._tma_load, desc, c, dst, mb, targets))

    def _targets(self, dst, mb, mask):
        """[(Shared, local address, mbarrier address)] a copy is delivered to."""
        if mask is None:
            sm = self.cta.smem if dst >> 24 == 0 else self.grid.peer(dst >> 24)
            return [(sm, dst & 0xFFFFFF, mb)]
        return [(self.grid.peer(r + 1), dst & 0xFFFFFF, (mb & 0xFFFFFF) | (r + 1) << 24)
                for r in range(16) if mask >> r & 1]

    def _tma_load(self, desc, c, dst, mb, mask):
        tile = desc.read(c)
        raw = tile.reshape(-1).view(u1)
        for sm, a, b in self._targets(dst, mb, mask):
            if a % 128 and desc.swizzle or a % 16:
                self._fault(f"TMA destination {a:#x} is not aligned")
            self._deliver(sm, a, raw, _SWZ[desc.swizzle])
            self._tx(b, -len(raw))

    def _deliver(self, sm, a, raw, mask):
        if a + len(raw) > self.grid.smem_bytes:
            self._fault(f"bulk copy to {a:#x}..{a + len(raw):#x} outside shared memory")
        if len(raw) % 16 == 0:
            chunk = np.arange(a >> 4, (a + len(raw)) >> 4)
            if mask:
                chunk = chunk ^ ((chunk >> 3) & mask)
            sm.rows16[chunk] = raw.view(u8).reshape(-1, 2)
        else:
            sm.raw[a:a + len(raw)] = raw
        w = slice(a >> 2, (a + len(raw)) >> 2)
        if sm.written is not None:
            sm.written[w] = True
        if self.checks.proxy:
            sm.wtime[w] = 0

    def _collect(self, a, nbytes, mask, what):
        sm = self.cta.smem
        if a + nbytes > self.grid.smem_bytes:
            self._fault(f"{what} from {a:#x} reaches outside shared memory")
        if nbytes % 16 == 0:
            chunk = np.arange(a >> 4, (a + nbytes) >> 4)
            if mask:
                chunk = chunk ^ ((chunk >> 3) & mask)
            out = sm.rows16[chunk].reshape(-1).view(u1)
        else:
            out = sm.raw[a:a + nbytes].copy()
        self._async_reads(sm, np.arange(a >> 2, (a + nbytes) >> 2), what)
        return out

    def tma_store(self, m, mp, coords, s, so, red):
        for l in self._lanes(m):
            desc = self.grid.tensormap(self._at(mp, l))
            c = [self._at(x, l) for x in coords]
            a = self._at(s, l) + so
            self._later(l, partial(self._tma_store, desc, c, a & 0xFFFFFF, red))

    def _tma_store(self, desc, c, a, red):
        raw = self._collect(a, desc.box_bytes, _SWZ[desc.swizzle], "TMA store")
        desc.write(c, raw, red)
        self.grid.events += 1

    def _later(self, lane, work):
        """Run now, or in late mode when the lane waits for its bulk group."""
        if self.checks.late:
            self.bulk_open.setdefault(lane, []).append(work)
        else:
            work()

    def tensormap_replace(self, m, space, addr, off, field, i, value):
        for l in self._lanes(m):
            a, v = self._at(addr, l) + off, self._at(value, l)
            if space == "shared":
                blob = self.cta.smem.raw[a & 0xFFFFFF:(a & 0xFFFFFF) + 128]
            else:
                reg = self.grid.memory.find(a, a + 128, "tensor map write"); base, views = reg.start, {np.dtype(u1): reg.bytes}
                blob = views[np.dtype(u1)][a - base:a - base + 128]
            w = blob.view(u4)
            if field == "global_address":
                blob[:8].view(u8)[0] = v
            elif field == "global_dim":
                w[8 + i] = (v - 1) & 0xFFFFFFFF
            else:
                w[3 + i] = (v >> 4) & 0xFFFFFFFF
                w[7] = (int(w[7]) & ~(15 << 4 * i)) | (v >> 36 & 15) << 4 * i

    def tensormap_copy(self, m, d, do, s, so, n):
        for l in self._lanes(m):
            a, g = (self._at(s, l) + so) & 0xFFFFFF, self._at(d, l) + do
            reg = self.grid.memory.find(g, g + n, "tensor map write"); base, views = reg.start, {np.dtype(u1): reg.bytes}
            views[np.dtype(u1)][g - base:g - base + n] = self.cta.smem.raw[a:a + n]

    def bulk_load(self, m, d, do, s, so, size, bar, bo, multicast):
        for l in self._lanes(m):
            dst, mb, g, n = self._at(d, l) + do, self._at(bar, l) + bo, self._at(s, l) + so, self._at(size, l)
            mask = None if multicast is None else self._at(multicast, l)

            def copy(dst=dst, mb=mb, g=g, n=n, mask=mask):
                reg = self.grid.memory.find(g, g + n, "bulk read"); base, views = reg.start, {np.dtype(u1): reg.bytes}
                raw = views[np.dtype(u1)][g - base:g - base + n].copy()
                for sm, a, b in self._targets(dst, mb, mask):
                    self._deliver(sm, a, raw, 0)
                    self._tx(b, -n)
            if g % 16 or n % 16 or dst % 16:
                self._fault("cp.async.bulk needs 16-byte alignment and size")
            self.grid.asynchronously(copy)

    def bulk_s2s(self, m, d, do, s, so, size, bar, bo):
        for l in self._lanes(m):
            dst, mb, a, n = self._at(d, l) + do, self._at(bar, l) + bo, self._at(s, l) + so, self._at(size, l)
            raw = self._collect(a & 0xFFFFFF, n, 0, "bulk copy")
            for sm, x, b in self._targets(dst, mb, None):
                self._deliver(sm, x, raw, 0)
                self._tx(b, -n)

    def bulk_store(self, m, g, go, s, so, size, red, t):
        for l in self._lanes(m):
            dst, a, n = self._at(g, l) + go, self._at(s, l) + so, self._at(size, l)
            self._later(l, partial(self._bulk_store, dst, a & 0xFFFFFF, n, red, t))

    def _bulk_store(self, dst, a, n, red, t):
        raw = self._collect(a, n, 0, "bulk store")
        try:
            reg = self.grid.memory.find(dst, dst + n, "bulk write"); base, views = reg.start, {np.dtype(u1): reg.bytes}
        except OutOfBounds as e:
            raise KernelError(str(e)) from None
        out = views[np.dtype(u1)][dst - base:dst - base + n]
        self.grid.events += 1
        if red is None:
            out[:] = raw
            return
        dt = {"f32": f4, "f16": f2, "u32": u4, "s32": np.int32, "u64": u8, "f64": np.float64}.get(t)
        if red != "add" or dt is None:
            raise NotImplementedError(f"bulk reduction {red} {t}")
        out = out.view(dt)
        out += raw.view(dt)

    def bulk_commit(self, m):
        if self.checks.late:
            for l in self._lanes(m):
                if l in self.bulk_open:
                    self.bulk_groups.setdefault(l, []).append(self.bulk_open.pop(l))

    def bulk_wait(self, m, n, read):
        if self.checks.late and self.bulk_groups:
            for l in self._lanes(m):
                self._drain(self.bulk_groups, l, n)

    # ---- wgmma ----------------------------------------------------------------------
    def wgmma(self, spec, da, db, scale):
        da, db = None if da is None else int(da[0]), int(db[0])
        keep = bool(scale if isinstance(scale, bool) else scale[0])
        if self.checks.wgmma:
            self.open_group |= spec["acc_set"]
            if da is None:
                self.a_open |= set(spec["a_regs"].tolist())
        if self.checks.late:
            self.mma_open.append(partial(self._wgmma, spec, da, db, keep))
        else:
            self._wgmma(spec, da, db, keep)

    def _wgmma(self, spec, da, db, keep):
        n, k = spec["n"], spec["k"]
        es, dt = _ELEM[spec["bt"]]
        sm = self.cta.smem
        try:
            bi = operand_index(db, n, k, es, bool(spec["trb"]))
            b = decode(sm.view[dt][bi], spec["bt"])
            esa, dta = _ELEM[spec["at"]]
            if da is not None:
                ai = operand_index(da, 64, k, esa, bool(spec["tra"]))
                a = decode(sm.view[dta][ai], spec["at"])
            else:
                a = self._a_fragment(spec["a_regs"], k, esa, dta, spec["at"])
        except IndexError:
            raise KernelError(f"PTX line {spec['line']}: wgmma operand outside shared memory") from None
        if self.checks.proxy or self.checks.uninit:
            self._async_reads(sm, np.unique(bi * es >> 2), f"wgmma (PTX line {spec['line']}, B)")
            if da is not None:
                self._async_reads(sm, np.unique(ai * esa >> 2), f"wgmma (PTX line {spec['line']}, A)")
        if spec["neg_a"] < 0:
            a = -a
        if spec["neg_b"] < 0:
            b = -b
        c = a @ b.T
        # D[16w + 8h + g, 8j + 2q + p] lives in lane 32w + 4g + q, element 4j + 2h + p
        c = c.reshape(4, 2, 8, n // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4).reshape(n // 2, 128)
        acc = spec["acc"]
        if spec["dt"] == "f32":
            if not keep:
                self.WF[acc] = c
            elif isinstance(acc, slice):
                self.WF[acc] += c
            else:
                self.WF[acc] = self.WF[acc] + c
        elif spec["dt"] == "f16":
            if keep:
                old = self.W[acc]
                h = np.empty_like(c)
                h[0::2], h[1::2] = (old & u4(0xFFFF)).astype(u2).view(f2), (old >> u4(16)).astype(u2).view(f2)
                c = c + h
            h = c.astype(f2).view(u2).astype(u4)
            self.W[acc] = h[0::2] | (h[1::2] << u4(16))
        else:
            ci = np.rint(c).astype(np.int32).view(u4)
            self.W[acc] = ci + self.W[acc] if keep else ci

    def _a_fragment(self, regs, k, es, dt, t):
        """The 64xK matrix held in registers."""
        per = 4 // es
        x = self.W[regs]                                                # (regs, 128)
        x = np.ascontiguousarray(x.T).view(dt).reshape(4, 8, 4, 2, 2, per)  # warp, g, q, khalf, rowhalf, element
        x = x.transpose(0, 4, 1, 3, 2, 5).reshape(64, k)
        return decode(x, t)

    def wgmma_fence(self):
        pass

    def wgmma_commit(self):
        if self.checks.late:
            self.mma_groups.append(self.mma_open)
            self.mma_open = []
        if self.checks.wgmma:
            self.pending.append(self.open_group)
            self.a_pending.append(self.a_open)
            self.open_group, self.a_open = set(), set()

    def wgmma_wait(self, n):
        if self.checks.late:
            done = self.mma_groups[:max(0, len(self.mma_groups) - n)]
            del self.mma_groups[:len(done)]
            for group in done:
                for work in group:
                    work()
        if self.checks.wgmma:
            del self.pending[:max(0, len(self.pending) - n)]
            del self.a_pending[:max(0, len(self.a_pending) - n)]

    def _check_in_flight(self, touched, written, pc):
        busy = set().union(self.open_group, *self.pending) & touched
        what = "accumulator"
        if not busy:
            busy, what = set().union(self.a_open, *self.a_pending) & written, "A operand"
        if busy:
            names = {v[1]: k for k, v in self.grid.kernel.regs.items() if v[0] == "w"}
            self._fault(f"near PTX line {self.grid.kernel.code[pc].line}: {what} register {names[min(busy)]} (and "
                        f"{len(busy) - 1} more) {'used' if what[0] == 'a' else 'overwritten'} while its wgmma is "
                        f"still in flight (no wait_group)")

    # ---- mma.sync ---------------------------------------------------------------------
    def mma(self, m, shape, types, d, ai, bi, c):
        k = int(shape.split("k")[1])                # all shapes are m16n8
        dt, at, bt, ct = types
        es, el = _ELEM[at]
        per = 4 // es
        warps = np.arange(self.L // 32) if m is None else np.flatnonzero(m.reshape(-1, 32).any(1))
        nw = len(warps)
        grab = lambda regs: np.ascontiguousarray(self.W[regs].reshape(len(regs), -1, 32)[:, warps].transpose(1, 2, 0))
        a = grab(ai).view(el)                                   # (warps, lane, reg*per)
        b = grab(bi).view(_ELEM[bt][1])
        kh = len(ai) // 2                                        # k halves
        a = a.reshape(nw, 8, 4, kh, 2, per).transpose(0, 4, 1, 3, 2, 5).reshape(nw, 16, k)
        b = b.reshape(nw, 8, 4, kh, per).transpose(0, 1, 3, 2, 4).reshape(nw, 8, k)
        r = decode(a, at) @ decode(b, bt).swapaxes(1, 2)         # (warps, 16, 8)
        r = r.reshape(nw, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, nw, 32)   # [2h+p]
        C = np.stack([N.rows(x, self.L).reshape(-1, 32)[warps] for x in c])
        if dt == "f32":
            out = (r + C.view(f4)).astype(f4).view(u4)
        else:
            lo, hi = (C & u4(0xFFFF)).astype(u2).view(f2), (C >> u4(16)).astype(u2).view(f2)
            h0, h1 = (r[0::2] + lo).astype(f2).view(u2).astype(u4), (r[1::2] + hi).astype(f2).view(u2).astype(u4)
            out = h0 | (h1 << u4(16))
        for i, reg in enumerate(d):
            self.U[reg].reshape(-1, 32)[warps] = out[i]


class TensorMap:
    """A 128-byte CUtensorMap in the hardware layout (see shim.c), opened over registered memory."""
    # hardware type codes (not the API's enum from 8 on): u8 u16 u32 s32 u64 s64 f16 f32 f32ftz f64 bf16 tf32 tf32ftz
    WIDTH = [1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4]
    FLOAT = {6: np.dtype(f2), 7: np.dtype(f4), 8: np.dtype(f4), 9: np.dtype(np.float64), 11: np.dtype(f4), 12: np.dtype(f4)}
    BF16 = 10

    def __init__(self, blob, memory):
        w = blob.view(u4).astype(np.int64).tolist()
        flags = w[2]
        rank, code, interleave = (flags >> 4 & 7) + 1, flags >> 7 & 15, flags >> 11 & 3
        self.swizzle, self.oob = flags >> 13 & 7, flags >> 16 & 1
        if flags & 15 != 2 or code >= len(self.WIDTH) or rank > 5 or interleave:
            raise KernelError(f"unsupported or corrupt tensor map: flags {flags:#x}")
        width = self.WIDTH[code]
        self.code, self.rank = code, rank
        self.address = w[0] | w[1] << 32
        self.dims = [x + 1 for x in w[8:8 + rank]]
        strides = [(w[3 + i] | (w[7] >> 4 * i & 15) << 32) << 4 for i in range(rank - 1)]
        self.box = [int(x) + 1 for x in blob[55:55 + rank]]
        es = [(w[13] >> 3 * i & 7) + 1 for i in range(rank)]
        if any(e != 1 for e in es):
            raise NotImplementedError("tensor map element strides")
        if self.swizzle not in _SWZ:
            raise NotImplementedError(f"tensor map swizzle mode {self.swizzle}")
        self.width = width
        self.box_bytes = int(np.prod(self.box)) * width
        self.dt = np.dtype(f"u{width}")
        self.memory = memory
        self.strides = [width] + strides

    def _window(self, c):
        """The part of the box at coordinates c inside the tensor: (view of memory, slices of the box)."""
        lo, shape, tile = 0, [], []
        for x, b, n, stride in zip(c, self.box, self.dims, self.strides):
            first, last = max(x, 0), min(x + b, n)
            if first >= last:
                return None, None
            lo += first * stride
            shape.append(last - first)
            tile.append(slice(first - x, last - x))
        # only what is touched must be registered: kernels offset the base so that it need not be (and let it wrap)
        lo = (self.address + lo) % 2**64
        hi = lo + sum((n - 1) * s for n, s in zip(shape, self.strides)) + self.width
        try:
            reg = self.memory.find(lo, hi, "TMA access"); base, views = reg.start, {np.dtype(u1): reg.bytes}
        except OutOfBounds as e:
            raise KernelError(f"{e}; tensor map base {self.address:#x} dims {self.dims} strides {self.strides} "
                              f"box {self.box} at {c}") from None
        view = np.ndarray(shape[::-1], self.dt, views[np.dtype(u1)], lo - base, self.strides[::-1])
        return view, tuple(tile[::-1])

    def read(self, c):
        out = np.zeros(self.box[::-1], self.dt)
        if self.oob:
            out.fill({2: 0x7FFF, 4: 0x7FFFFFFF}.get(self.width, 0))
        view, tile = self._window(c)
        if view is not None:
            out[tile] = view
        return out

    def write(self, c, raw, red):
        view, tile = self._window(c)
        if view is None:
            return
        x = raw.view(self.dt).reshape(self.box[::-1])[tile]
        if red is None:
            view[...] = x
            return
        if self.code == self.BF16:
            f = {"add": np.add, "min": np.minimum, "max": np.maximum}[red]
            view[...] = N.f32_to_bf16(f(N.bf16_to_f32(view), N.bf16_to_f32(x)))
            return
        dt = self.FLOAT.get(self.code, np.dtype(np.int32) if self.code == 3 else self.dt)
        f = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
             "xor": np.bitwise_xor}[red]
        view[...] = f(np.ascontiguousarray(view).view(dt), np.ascontiguousarray(x).view(dt)).view(self.dt)


_lowered = {}


class Grid:
    """One launch: shared state of the CTAs of the cluster being run."""

    def __init__(self, kernel, dims, block, cluster, dynamic_smem, params, memory, checks):
        self.kernel, self.dims, self.block, self.cluster = kernel, dims, block, cluster
        self.params, self.memory, self.checks = params, memory, checks
        self.dynamic_smem, self.smem_bytes = dynamic_smem, kernel.static_smem + dynamic_smem
        self.smem_alloc = (self.smem_bytes + 1023) // 1024 * 1024
        self.nthreads = block[0] * block[1] * block[2]
        key = (id(kernel), checks.wgmma)
        if key not in _lowered:
            _lowered[key] = (Lower(kernel, checks.wgmma), [sync_kind(i) for i in kernel.code])
        self.lower, self.kinds = _lowered[key]
        self.maps, self.ticks, self.now, self.events = {}, 0, 0, 0
        self.fences = np.zeros(16 * 1024, np.int64)
        self.ctas, self.queue = [], []
        self.cluster_gen = self.cluster_count = 0
        self.limit = 20_000_000

    def peer(self, window):
        r = window - 1
        if not 0 <= r < len(self.ctas):
            raise KernelError(f"shared::cluster access to CTA {r} of a cluster of {len(self.ctas)}")
        return self.ctas[r].smem

    def tensormap(self, address):
        if address >> 56 == 2:
            off = address & 0xFFFFFFFF
            blob = self.params[off:off + 128]
        else:
            reg = self.memory.find(address, address + 128, "tensor map read"); base, views = reg.start, {np.dtype(u1): reg.bytes}
            blob = views[np.dtype(u1)][address - base:address - base + 128]
        key = blob.tobytes()
        if key not in self.maps:
            self.maps[key] = TensorMap(blob.copy(), self.memory)
        return self.maps[key]

    def asynchronously(self, copy):
        if self.checks.late:
            self.queue.append(copy)
        else:
            copy()

    def cluster_settle(self):
        live = sum(c.live for c in self.ctas)
        if self.cluster_count and self.cluster_count >= live:
            self.cluster_gen += 1
            self.cluster_count = 0
            self.events += 1

    def run_cluster(self, ctaids):
        self.ctas = [CTA(self, r, c, self.checks) for r, c in enumerate(ctaids)]
        self.cluster_gen = self.cluster_count = 0
        units = [u for c in self.ctas for u in c.units]
        stale, seen = 0, -1
        try:
            while True:
                ran = False
                for u in units:
                    if u.frags and u.run():
                        ran = True
                units = [u for u in units if u.frags]
                if not units:
                    break
                if ran and self.events != seen:
                    seen, stale = self.events, 0
                    if sum(x.instrs for x in units) > self.limit:
                        raise KernelError(f"more than {self.limit} instructions in one cluster: an endless loop?")
                    continue
                if self.queue:                          # let one outstanding copy land
                    self.queue.pop(0)()
                    stale = 0
                    continue
                stale += 1
                if stale > 50:
                    raise Deadlock(self._report(units))
                seen = self.events
                for u in units:                         # waits time out: try_wait may return false
                    for f in u.frags:
                        if f.state == WAIT:
                            f.timeout = True
            for q in self.queue:
                q()
            self.queue = []
        except (KernelError, NotImplementedError, IndexError) as e:
            where = getattr(u, "pc", None)
            line = self.kernel.code[where].line if where is not None and where < len(self.kernel.code) else "?"
            if isinstance(e, Deadlock):
                raise
            loc = self.kernel.code[where].loc if line != "?" else ""
            raise type(e)(f"{e}\n  in CTA {u.cta.ctaid[:3]}, warpgroup {u.index}, segment starting at PTX line {line} "
                          f"of {self.kernel.name[:60]}{' (.loc ' + loc + ')' if loc else ''}") from e
        return [u for c in self.ctas for u in c.units]

    def _report(self, units):
        out = ["deadlock: every warp is blocked"]
        code = self.kernel.code
        for u in units:
            for f in u.frags:
                warps = np.flatnonzero(f.mask.reshape(-1, 32).any(1)) + 4 * u.index
                ins = code[f.pc] if f.pc < len(code) else None
                what = STATE[f.state]
                k = getattr(f, "key", None)
                if f.state == WAIT and isinstance(k, tuple) and k[0] == "mbarrier":
                    what = (f"mbarrier {k[1] & 0xFFFFFF:#x} parity {k[2]} (phase {k[3].phase}, {k[3].pending} of "
                            f"{k[3].count} arrivals and {k[3].tx} bytes outstanding)")
                elif f.state == WAIT and isinstance(k, tuple):
                    what = k[0]
                elif f.state == BAR:
                    what = f"barrier {k[1]}: {k[2][0]} of {k[2][2] or u.cta.live} threads arrived"
                out.append(f"  CTA {u.cta.ctaid[:3]} warps {warps.tolist()} ({int(f.mask.sum())} lanes): {what} at PTX "
                           f"line {ins.line if ins else '?'}: {ins.text[:90] if ins else ''}")
        return "\n".join(out)


def run_grid(kernel, dims, block, cluster, smem_bytes, params, memory, checks=(), only=None):
    """Run every CTA of a launch (or those in `only`); returns statistics."""
    checks = checks if isinstance(checks, Checks) else Checks(checks)
    if any(d % c for d, c in zip(dims, cluster)):
        raise KernelError(f"grid {dims} is not a multiple of the cluster {cluster}")
    g = Grid(kernel, dims, block, cluster, smem_bytes, params, memory, checks)
    need = kernel.directives.get("reqntid")
    if need and (need + [1, 1])[:3] != list(block):
        raise KernelError(f"launched with block {block}, compiled for {need}")
    if g.smem_bytes > 232448:
        raise KernelError(f"{g.smem_bytes} bytes of shared memory requested, 232448 available")
    instrs = steps = 0
    cx, cy, cz = cluster
    for z in range(0, dims[2], cz):
        for y in range(0, dims[1], cy):
            for x in range(0, dims[0], cx):
                ids = [(x + i, y + j, z + k, x + i + dims[0] * (y + j + dims[1] * (z + k)))
                       for k in range(cz) for j in range(cy) for i in range(cx)]
                if only and not any(i[:3] in only for i in ids):
                    continue
                for u in g.run_cluster(ids):
                    instrs += u.instrs
                    steps += u.steps
    return {"instructions": instrs, "segments": steps}
