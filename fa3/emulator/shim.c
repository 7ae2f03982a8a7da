/* A CUDA runtime without a GPU, for code JIT-compiled by the CuTe DSL.
 *
 * The DSL's generated host code resolves a small set of thin wrappers (an
 * underscore in front of the public CUDA name, same signature) from the library
 * named by CUTE_DSL_LIBS.  This file implements them over host memory.  What it
 * cannot answer itself goes through a callback into Python (shim.py):
 *
 *   load(image, size)          -> library handle     (cudaLibraryLoadData)
 *   kernel(library, name)      -> kernel handle      (cudaLibraryGetKernel)
 *   launch(launch_info)        -> cudaError_t        (cudaLaunchKernelExC)
 *   attribute(number)          -> value              (cudaDeviceGetAttribute)
 *   alloc(address, size, add)                        (cudaMalloc, cudaFree)
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int err_t;              /* cudaError_t / CUresult */
enum { OK = 0, INVALID_VALUE = 1, NOT_SUPPORTED = 801, LAUNCH_FAILURE = 719 };

/* ---- callbacks into Python --------------------------------------------- */
typedef struct {
  uint64_t kernel;              /* handle returned by the kernel callback */
  uint32_t grid[3], block[3], cluster[3];
  uint32_t cooperative, pdl;    /* launch attributes seen */
  uint64_t smem_bytes;          /* dynamic shared memory */
  uint64_t stream;
  void **params;                /* one pointer per kernel parameter */
} launch_t;

static uint64_t (*cb_load)(const void *, uint64_t);
static uint64_t (*cb_kernel)(uint64_t, const char *);
static err_t (*cb_launch)(const launch_t *);
static int (*cb_attribute)(int);
static void (*cb_alloc)(void *, uint64_t, int);   /* address, bytes, 1=alloc 0=free */

void fa3_emulator_install(void *load, void *kernel, void *launch, void *attribute, void *alloc) {
  cb_load = load; cb_kernel = kernel; cb_launch = launch;
  cb_attribute = attribute; cb_alloc = alloc;
}

/* ---- tensor maps -------------------------------------------------------- */
/* DSL 4.8 writes CUtensorMap objects inline in its host code and never calls this,
 * so the emulator decodes the hardware layout (memory/tensormap.py).  This entry
 * point produces the same layout for code that does call the driver's encoder:
 *   u64 0      address
 *   u32 8      2 | rank-1 << 4 | type << 7 | interleave << 11 | swizzle << 13
 *                | oob << 16 | l2 << 17
 *   u32 12..   strides of dimensions 1..4, bytes >> 4, low 32 bits
 *   u32 28     their bits 32..35, four each
 *   u32 32..   dimensions 0..4, minus one
 *   u8  55..   box extents 0..4, minus one
 *   u16 52     element strides minus one, three bits each   (assumed)
 */
err_t _cuTensorMapEncodeTiled(void *map, uint32_t dtype, uint32_t rank, void *address,
                              const uint64_t *dim, const uint64_t *stride,
                              const uint32_t *box, const uint32_t *elem_stride,
                              uint32_t interleave, uint32_t swizzle, uint32_t l2,
                              uint32_t oob) {
  static const int width[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  static const uint32_t span[] = {0, 32, 64, 128};
  uint32_t w[32] = {0}, es = 0;
  uint8_t *bytes = (uint8_t *)w;
  if (rank < 1 || rank > 5 || ((uintptr_t)map & 63)) return INVALID_VALUE;
  if (dtype >= sizeof width / sizeof *width || interleave != 0) return NOT_SUPPORTED;
  if ((uintptr_t)address & 15) return INVALID_VALUE;
  if ((box[0] * width[dtype]) % 16) return INVALID_VALUE;
  if (swizzle > 0 && swizzle < 4 && box[0] * width[dtype] > span[swizzle]) return INVALID_VALUE;
  w[0] = (uint32_t)(uintptr_t)address;
  w[1] = (uint32_t)((uintptr_t)address >> 32);
  /* API enum -> hardware */
  static const uint8_t code[] = {0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 8, 11, 12};
  w[2] = 2 | (rank - 1) << 4 | code[dtype] << 7 | interleave << 11 | swizzle << 13 | oob << 16
         | l2 << 17;
  for (uint32_t i = 0; i < rank; i++) {
    if (dim[i] == 0 || dim[i] > (1ull << 32)) return INVALID_VALUE;
    if (box[i] == 0 || box[i] > 256) return INVALID_VALUE;
    if (elem_stride[i] == 0 || elem_stride[i] > 8) return INVALID_VALUE;
    w[8 + i] = (uint32_t)(dim[i] - 1);
    bytes[55 + i] = (uint8_t)(box[i] - 1);
    es |= (elem_stride[i] - 1) << 3 * i;
    if (i + 1 < rank) {
      if ((stride[i] & 15) || stride[i] >= (1ull << 40)) return INVALID_VALUE;
      w[3 + i] = (uint32_t)(stride[i] >> 4);
      w[7] |= (uint32_t)(stride[i] >> 36) << 4 * i;
    }
  }
  w[13] = es;
  memcpy(map, w, 128);
  return OK;
}

/* ---- launches ---------------------------------------------------------- */
typedef struct { uint32_t x, y, z; } dim3_t;
typedef struct {
  uint32_t id, pad;
  union { dim3_t cluster; int flag; char bytes[64]; } v;
} attr_t;
typedef struct {
  dim3_t grid, block;
  uint64_t smem;
  void *stream;
  attr_t *attrs;
  uint32_t nattrs;
} config_t;

err_t _cudaLaunchKernelEx(const config_t *c, const void *kernel, void **params) {
  launch_t l;
  memset(&l, 0, sizeof l);
  l.kernel = (uint64_t)(uintptr_t)kernel;
  memcpy(l.grid, &c->grid, 12);
  memcpy(l.block, &c->block, 12);
  l.cluster[0] = l.cluster[1] = l.cluster[2] = 1;
  for (uint32_t i = 0; i < c->nattrs; i++) {
    const attr_t *a = &c->attrs[i];
    if (a->id == 4) memcpy(l.cluster, &a->v.cluster, 12);   /* ClusterDimension */
    else if (a->id == 2) l.cooperative = a->v.flag;         /* Cooperative */
    else if (a->id == 6) l.pdl = a->v.flag;                 /* ProgrammaticStreamSerialization */
  }
  l.smem_bytes = c->smem;
  l.stream = (uint64_t)(uintptr_t)c->stream;
  l.params = params;
  return cb_launch ? cb_launch(&l) : NOT_SUPPORTED;
}
err_t _cudaLaunchKernel(const void *kernel, uint32_t gx, uint32_t gy, uint32_t gz, uint32_t bx,
                        uint32_t by, uint32_t bz, uint64_t smem, void *stream, void **params) {
  config_t c = {{gx, gy, gz}, {bx, by, bz}, smem, stream, NULL, 0};
  return _cudaLaunchKernelEx(&c, kernel, params);
}

/* ---- libraries and kernels -------------------------------------------- */
/* The generated code hands over a fatbin: {u32 magic 0xba55ed50, u16 version, u16 header
 * size, u64 payload size} followed by entries, here one uncompressed cubin.  A bare
 * cubin (ELF) ends with its section or its program headers. */
static uint64_t table_end(const unsigned char *elf, int offset_at, int entry_at) {
  uint64_t offset;
  uint16_t entry, count;
  memcpy(&offset, elf + offset_at, 8);
  memcpy(&entry, elf + entry_at, 2);
  memcpy(&count, elf + entry_at + 2, 2);
  return offset + (uint64_t)entry * count;
}
static uint64_t image_size(const unsigned char *p) {
  uint32_t magic;
  uint16_t header;
  uint64_t size, programs;
  memcpy(&magic, p, 4);
  if (magic == 0xba55ed50u) {
    memcpy(&header, p + 6, 2);
    memcpy(&size, p + 8, 8);
    return header + size;
  }
  if (memcmp(p, "\177ELF", 4)) return 0;
  size = table_end(p, 0x28, 0x3a);
  programs = table_end(p, 0x20, 0x36);
  return size > programs ? size : programs;
}
err_t _cudaLibraryLoadData(void **lib, const void *code, void *jo, void **jv, unsigned nj,
                           void *lo, void **lv, unsigned nl) {
  *lib = (void *)(uintptr_t)cb_load(code, image_size(code));
  return *lib ? OK : INVALID_VALUE;
}
err_t _cuLibraryLoadData(void **lib, const void *code, void *jo, void **jv, unsigned nj,
                         void *lo, void **lv, unsigned nl) {
  return _cudaLibraryLoadData(lib, code, jo, jv, nj, lo, lv, nl);
}
err_t _cudaLibraryGetKernel(void **kernel, void *lib, const char *name) {
  *kernel = (void *)(uintptr_t)cb_kernel((uint64_t)(uintptr_t)lib, name);
  return *kernel ? OK : 500;
}
err_t _cuLibraryGetKernel(void **kernel, void *lib, const char *name) {
  return _cudaLibraryGetKernel(kernel, lib, name);
}
err_t _cudaLibraryUnload(void *lib) { return OK; }
err_t _cuLibraryUnload(void *lib) { return OK; }
err_t _cudaFuncSetAttribute(const void *f, int attr, int value) { return OK; }
err_t _cudaKernelSetAttributeForDevice(void *k, int attr, int value, int dev) { return OK; }
err_t _cuKernelGetAttribute(int *v, int attr, void *k, int dev) { *v = 0; return OK; }

/* ---- device ------------------------------------------------------------ */
err_t _cudaGetDevice(int *d) { *d = 0; return OK; }
err_t _cuDeviceGet(int *d, int ordinal) { *d = ordinal; return OK; }
err_t _cudaGetDeviceCount(int *n) { *n = 1; return OK; }
err_t _cudaSetDevice(int d) { return d == 0 ? OK : 101; }
err_t _cudaDeviceGetAttribute(int *v, int attr, int dev) {
  *v = cb_attribute ? cb_attribute(attr) : 0;
  return OK;
}
err_t _cudaDeviceSynchronize(void) { return OK; }
err_t _cudaGetLastError(void) { return OK; }
err_t _cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int block,
                                                     size_t smem) {
  *n = 1;
  return OK;
}

/* ---- memory: device memory is host memory ------------------------------ */
static void *alloc(size_t n) {
  void *p = NULL;
  if (posix_memalign(&p, 256, n ? n : 256)) return NULL;
  if (cb_alloc) cb_alloc(p, n, 1);
  return p;
}
static void release(void *p) { if (p && cb_alloc) cb_alloc(p, 0, 0); free(p); }
err_t _cudaMalloc(void **p, size_t n) { return (*p = alloc(n)) ? OK : 2; }
err_t _cudaMallocAsync(void **p, size_t n, void *s) { return _cudaMalloc(p, n); }
err_t _cudaMallocHost(void **p, size_t n) { return _cudaMalloc(p, n); }
err_t _cudaMallocManaged(void **p, size_t n, unsigned f) { return _cudaMalloc(p, n); }
err_t _cudaFree(void *p) { release(p); return OK; }
err_t _cudaFreeAsync(void *p, void *s) { release(p); return OK; }
err_t _cudaFreeHost(void *p) { release(p); return OK; }
err_t _cudaMemcpy(void *d, const void *s, size_t n, int kind) {
  memmove(d, s, n);
  return OK;
}
err_t _cudaMemcpyAsync(void *d, const void *s, size_t n, int kind, void *stream) {
  return _cudaMemcpy(d, s, n, kind);
}
err_t _cudaMemset(void *d, int v, size_t n) {
  memset(d, v, n);
  return OK;
}
err_t _cudaMemsetAsync(void *d, int v, size_t n, void *stream) { return _cudaMemset(d, v, n); }

/* ---- streams and events: everything is synchronous --------------------- */
err_t _cudaStreamCreate(void **s) { *s = NULL; return OK; }
err_t _cudaStreamDestroy(void *s) { return OK; }
err_t _cudaStreamSynchronize(void *s) { return OK; }
err_t _cudaStreamWaitEvent(void *s, void *e) { return OK; }
err_t _cudaEventCreate(void **e) { *e = NULL; return OK; }
err_t _cudaEventRecord(void *e, void *s) { return OK; }
err_t _cudaEventDestroy(void *e) { return OK; }
err_t _cudaEventElapsedTime(float *ms, void *a, void *b) { *ms = 0; return OK; }

/* ---- support entry points of the generated host code -------------------- */
const char *cuda_dialect_get_error_name(int e) { return e ? "emulated-cuda-error" : "cudaSuccess"; }
void cuda_dialect_assert_success(int e) {
  if (e) { fprintf(stderr, "emulated CUDA error %d\n", e); abort(); }
}
void cuda_dialect_print_on_error(int e) { if (e) fprintf(stderr, "emulated CUDA error %d\n", e); }

typedef void (*set_error_t)(const char *kind, const char *message);
int cuda_dialect_init_library_once(void **lib, err_t (*init)(void **), err_t (*load)(void **, int),
                                   set_error_t set_error) {
  if (*lib) return 0;
  void *l = NULL;
  err_t e = init(&l);
  if (!e && load) e = load(&l, 0);
  if (e) { set_error("RuntimeError", "emulated CUDA library load failed"); return -1; }
  *lib = l;
  return 0;
}
void cuda_dialect_unload_library_once(void **lib) { *lib = NULL; }

typedef void (*set_error_parts_t)(const char *kind, const char **parts, int32_t n);
static char failure[4096];      /* what the last failed launch raised */
void fa3_emulator_failed(const char *text) { snprintf(failure, sizeof failure, "%s", text); }
void CuteDSLRT_TVMFFISetRaisedCudaError(set_error_parts_t set, int32_t code) {
  char text[sizeof failure + 64];
  snprintf(text, sizeof text, "emulated CUDA error %d: %s", code, failure);
  const char *parts[] = {text};
  set("RuntimeError", parts, 1);
}
void CuteDSLRT_TVMFFISetRaisedCudaLaunchError(set_error_parts_t set, ...) {
  const char *parts[] = {"emulated CUDA launch preflight failed"};
  set("RuntimeError", parts, 1);
}
