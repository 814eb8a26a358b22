// Packs weights; the counterpart of src/quant/kernels/packing, with the same
// arithmetic rounded in the same order, so that the bytes are the same.
//
// Compiled with W, the weight's dtype, in which a scheme computes where it says
// nothing else, and CODE, a code of formats.cuh for `pack_codes`. Weights are
// contiguous and finite. Each value is read twice, the second time from a cache.
#include "formats.cuh"

constexpr int THREADS = 256;

__device__ __forceinline__ float at(const W* weight, i64 i) { return to_float(weight[i]); }
__device__ __forceinline__ float within(float v, float low, float high) {
  return v < low ? low : v > high ? high : v;
}

// The largest of all threads' values, for all of them. `parts` has a place for
// each warp.
__device__ __forceinline__ float block_max(float v, float* parts) {
  v = warp_max(v);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
  __syncthreads();
  v = parts[0];
  for (int i = 1; i < THREADS / 32; i++) v = larger(v, parts[i]);
  __syncthreads();
  return v;
}

// --- A byte for each element, a scale for each row ---

struct Rows {
  const W* weight;
  u8* codes;
  // (rows), in W or f32.
  void* scales;
  i64 rows;
  i64 columns;
  // Limits of the scale.
  double smallest;
  double largest;
};

struct Int8Code {
  using Scale = W;
  static __device__ float read(float v) { return v; }
  static __device__ float scale(const Rows& p, float max) {
    return within(rounded<W>(max / 127.0f), 0.0f, (float)p.largest);
  }
  // A row of zeros has scale 0 and must not be divided by it.
  static __device__ float divisor(float scale) { return scale != 0.0f ? scale : 1.0f; }
  static __device__ u8 code(float v, float divisor) {
    return (u8)(signed char)within(rintf(rounded<W>(v / divisor)), -128.0f, 127.0f);
  }
};

// bitsandbytes': the weight goes through f16, and the arithmetic is f32.
struct LlmInt8Code {
  using Scale = float;
  static __device__ float read(float v) { return rounded<f16>(v); }
  static __device__ float scale(const Rows&, float max) { return max; }
  static __device__ float divisor(float scale) { return 1.0f / (scale != 0.0f ? scale : 1.0f) * 127.0f; }
  static __device__ u8 code(float v, float factor) { return (u8)(signed char)rintf(v * factor); }
};

// The nearest 8-bit float with so many bits of mantissa, ties to even, of a
// value that is not above the largest.
template <int MANTISSA>
__device__ __forceinline__ u8 to_fp8(float v) {
  constexpr int BIAS = MANTISSA == 3 ? 7 : 15, DROPPED = 23 - MANTISSA;
  u32 bits = __float_as_uint(v), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
  if (magnitude < (u32)(128 - BIAS) << 23) {
    // Subnormal: a whole number of the smallest.
    float unit = __uint_as_float((u32)(127 + BIAS - 1 + MANTISSA) << 23);
    return (u8)(sign | (u32)rintf(__uint_as_float(magnitude) * unit));
  }
  u32 up = (1u << (DROPPED - 1)) - 1 + (magnitude >> DROPPED & 1);
  return (u8)(sign | ((magnitude + up) >> DROPPED) - ((127 - BIAS) << MANTISSA));
}

template <int MANTISSA>
struct Fp8Code {
  using Scale = W;
  static constexpr float TOP = MANTISSA == 3 ? 448.0f : 57344.0f;
  static __device__ float read(float v) { return v; }
  static __device__ float scale(const Rows& p, float max) {
    return within(rounded<W>(max / TOP), (float)p.smallest, (float)p.largest);
  }
  static __device__ float divisor(float scale) { return scale; }
  static __device__ u8 code(float v, float divisor) {
    return to_fp8<MANTISSA>(within(rounded<W>(v / divisor), -TOP, TOP));
  }
};

template <typename Code>
__device__ __forceinline__ void pack_rows(const Rows& p) {
  __shared__ float parts[THREADS / 32];
  for (i64 row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const W* weight = p.weight + row * p.columns;
    float max = 0.0f;
    for (i64 i = threadIdx.x; i < p.columns; i += THREADS) max = larger(max, fabsf(Code::read(at(weight, i))));
    float scale = Code::scale(p, block_max(max, parts)), divisor = Code::divisor(scale);
    for (i64 i = threadIdx.x; i < p.columns; i += THREADS)
      p.codes[row * p.columns + i] = Code::code(Code::read(at(weight, i)), divisor);
    if (threadIdx.x == 0) static_cast<typename Code::Scale*>(p.scales)[row] = from_float<typename Code::Scale>(scale);
  }
}

KERNEL(pack_int8, Rows, 256) { pack_rows<Int8Code>(p); }
KERNEL(pack_llm_int8, Rows, 256) { pack_rows<LlmInt8Code>(p); }
KERNEL(pack_e4m3, Rows, 256) { pack_rows<Fp8Code<3>>(p); }
KERNEL(pack_e5m2, Rows, 256) { pack_rows<Fp8Code<2>>(p); }

// --- optimum-quanto's groups ---

struct GroupRows {
  // (groups, size)
  const W* weight;
  // (byte_rows, size)
  u8* bytes;
  W* scales;
  W* shifts;
  i64 groups;
  i64 size;
  i64 byte_rows;
  i64 bits;
};

// A block for each row of bytes: the groups whose codes it holds.
KERNEL(pack_groups, GroupRows, 256) {
  __shared__ float parts[THREADS / 32];
  const float top = (float)((1 << (int)p.bits) - 1), infinity = __uint_as_float(0x7f800000);
  // A group is no longer than a row.
  const u32 size = (u32)p.size;
  for (i64 row = blockIdx.x; row < p.byte_rows; row += gridDim.x) {
    u8* bytes = p.bytes + row * size;
    int bit = 0;
    for (i64 group = row; bit < 8 && group < p.groups; group += p.byte_rows, bit += (int)p.bits) {
      const W* weight = p.weight + group * size;
      float high = -infinity, low = -infinity;
      for (u32 i = threadIdx.x; i < size; i += THREADS) {
        high = larger(high, at(weight, i));
        low = larger(low, -at(weight, i));
      }
      // The shift is the least value with the other sign. Which of two zeros is found depends on the order: it is the
      // one without a sign.
      high = 0.0f + block_max(high, parts);
      float shift = -(0.0f - block_max(low, parts));
      float step = rounded<W>(rounded<W>(high + shift) / top);
      float divisor = step != 0.0f ? step : 1.0f;
      for (u32 i = threadIdx.x; i < size; i += THREADS) {
        float q = rintf(rounded<W>(rounded<W>(at(weight, i) + shift) / divisor));
        u8 code = (u8)((u32)within(q, 0.0f, top) << bit);
        // Each thread comes back to its own bytes.
        bytes[i] = bit == 0 ? code : (u8)(bytes[i] | code);
      }
      if (threadIdx.x == 0) {
        p.scales[group] = from_float<W>(step);
        p.shifts[group] = from_float<W>(shift);
      }
    }
  }
}

// --- bitsandbytes' 4 bits ---

struct Flat {
  const W* weight;
  u8* bytes;
  float* absmax;
  i64 count;
  i64 block;
};

__constant__ const u8 NF4_ORDER[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
// Of the two codes of zero the one with a sign comes last.
__constant__ const u8 FP4_ORDER[16] = {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3};

template <typename Code>
struct Order;
template <>
struct Order<Nf4> {
  static __device__ int code(int place) { return NF4_ORDER[place]; }
};
template <>
struct Order<Fp4> {
  static __device__ int code(int place) { return FP4_ORDER[place]; }
};

// The place among the rising values of the nearest one, ties to the lower.
__device__ __forceinline__ int place_of(const float* bounds, float v) {
  int place = 0;
  for (int i = 0; i < 15; i++) place += bounds[i] < v;
  return place;
}

// A warp for each block.
KERNEL(pack_codes, Flat, 256) {
  __shared__ float bounds[15];
  __shared__ int codes[16];
  if (threadIdx.x < 16) codes[threadIdx.x] = Order<CODE>::code(threadIdx.x);
  __syncthreads();
  if (threadIdx.x < 15) bounds[threadIdx.x] = (CODE::value(codes[threadIdx.x]) + CODE::value(codes[threadIdx.x + 1])) / 2.0f;
  __syncthreads();
  const float tiny = 1e-38f;
  const int lane = threadIdx.x % 32;
  const i64 warps = THREADS / 32, blocks = (p.count + p.block - 1) / p.block;
  for (i64 block = blockIdx.x * warps + threadIdx.x / 32; block < blocks; block += gridDim.x * warps) {
    const i64 start = block * p.block, rest = p.count - start;
    const bool whole = rest >= p.block;
    const i64 len = whole ? p.block : rest;
    float absmax = 0.0f;
    for (i64 i = lane; i < len; i += 32) absmax = larger(absmax, fabsf(at(p.weight, start + i)));
    absmax = warp_max(absmax);
    const float divisor = larger(absmax, tiny), factor = 1.0f / divisor;
    for (i64 i = 2 * lane; i < len; i += 64) {
      int pair[2];
#pragma unroll
      for (int k = 0; k < 2; k++) {
        // An odd one out is paired with a zero.
        float v = i + k < len ? at(p.weight, start + i + k) : 0.0f;
        float scaled = i + k >= len ? 0.0f : whole ? v * factor : v / divisor;
        pair[k] = codes[place_of(bounds, within(scaled, -1.0f, 1.0f))];
      }
      p.bytes[(start + i) / 2] = (u8)(pair[0] << 4 | pair[1]);
    }
    if (lane == 0) p.absmax[block] = whole ? absmax : divisor;
  }
}

// --- MXFP4 ---

struct Shared {
  const W* weight;
  // (rows, ⌈columns / 2⌉)
  u8* bytes;
  // (rows, ⌈columns / 32⌉)
  u8* scales;
  i64 rows;
  i64 columns;
};

// The exponent e of a positive value in [2^(e-1), 2^e).
__device__ __forceinline__ int exponent_of(float v) {
  u32 bits = __float_as_uint(v);
  if (bits >> 23) return (int)(bits >> 23) - 126;
  return (int)(__float_as_uint(v * __uint_as_float((127 + 24) << 23)) >> 23) - 126 - 24;
}

// The nearest e2m1 value's code, ties to the even mantissa.
__device__ __forceinline__ u32 nearest_e2m1(float v) {
  const float middles[7] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f};
  float magnitude = fabsf(v);
  u32 code = __float_as_uint(v) >> 31 << 3;
#pragma unroll
  for (int i = 0; i < 7; i++) code += i % 2 ? magnitude >= middles[i] : magnitude > middles[i];
  return code;
}

// A warp for each block of 32.
KERNEL(pack_mxfp4, Shared, 256) {
  const int lane = threadIdx.x % 32;
  const i64 warps = THREADS / 32, of_row = (p.columns + 31) / 32, blocks = p.rows * of_row;
  for (i64 block = blockIdx.x * warps + threadIdx.x / 32; block < blocks; block += gridDim.x * warps) {
    const i64 row = block / of_row, column = block % of_row * 32 + lane;
    const float v = column < p.columns ? at(p.weight, row * p.columns + column) : 0.0f;
    const float max = warp_max(fabsf(v));
    int byte = max == 0.0f ? 0 : exponent_of(max) - 3 + 127;
    byte = byte < 0 ? 0 : byte > 254 ? 254 : byte;
    const float step = __uint_as_float(byte == 0 ? 1u << 22 : (u32)byte << 23);
    const u32 low = nearest_e2m1(v / step), high = __shfl_xor_sync(0xffffffff, low, 1);
    if (lane % 2 == 0 && column < p.columns)
      p.bytes[row * ((p.columns + 1) / 2) + column / 2] = (u8)(low | high << 4);
    if (lane == 0) p.scales[block] = (u8)byte;
  }
}
