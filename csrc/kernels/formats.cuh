// How each scheme turns its bytes into values; the counterpart of
// src/quant/kernels/formats.rs, with the same products rounded in the same
// order.
//
// A weight is a matrix whose rows have `inn` elements. Kernels see it as units
// of eight consecutive elements of a row, where rows and blocks are whole
// numbers of units, or else as single elements. A format knows
//
//   BYTES            bytes of a unit
//   place(at)        where the bytes of a unit are
//   scale(at)        what multiplies it
//   decode(...)      the values of a unit's bytes, rounded to `B`
//   one(at)          the value of one element, rounded to `B`
//
// `W` is the dtype that the weight had, which values are rounded to; `B` is the
// dtype to round to before a value is rounded to the result's: none, that is
// f32, where that is `W`.
#pragma once
#include "common.cuh"

// What a launch says of a weight.
struct Weight {
  const u8* bytes;
  const void* scales;
  // Codes of doubly quantised scales, shifts, or zeros.
  const void* more;
  // Of doubly quantised scales: 256 values, a factor for 256 scales, a sum.
  const float* map;
  const float* nested;
  const float* offset;
  // Elements of a row, and of a block or group.
  i64 inn;
  i64 block;
  // Rows of bytes that hold one part of the groups' codes each.
  i64 packed_rows;
};

// A unit: its number in the weight, its row, and its number in the row.
struct Unit {
  u32 index;
  u32 row;
  u32 column;
};

// An element.
struct Element {
  i64 row;
  i64 column;
};

template <typename A, typename B>
struct Before {
  using type = A;
};
template <typename A>
struct Before<A, A> {
  using type = float;
};

// --- bitsandbytes' 4 bits: code[q] · scale, the even element in the high half ---

__constant__ const float NF4_VALUES[16] = {
    -1.0f,          -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f, -0.091050036f, 0.0f,
    0.0795803f,     0.1609302f,  0.2461123f,   0.33791524f, 0.44070983f,  0.562617f,    0.72295684f,   1.0f};
__constant__ const float FP4_VALUES[16] = {
    0.0f, 0.0052083335f,  0.6666667f,  1.0f,  0.33333334f,  0.5f,  0.16666667f,  0.25f,
    0.0f, -0.0052083335f, -0.6666667f, -1.0f, -0.33333334f, -0.5f, -0.16666667f, -0.25f};

struct Nf4 {
  static __device__ float value(int q) { return NF4_VALUES[q]; }
};
struct Fp4 {
  static __device__ float value(int q) { return FP4_VALUES[q]; }
};

// Makes the format with its table of the codes' values: sixteen words in banks
// of their own, which lanes read at once. To be called by all threads, first.
#define TABLE(format)                                                       \
  __shared__ float table_values[16];                                        \
  if (threadIdx.x < 16) table_values[threadIdx.x] = Format::code(threadIdx.x); \
  __syncthreads();                                                          \
  const Format format(p.weight, table_values)

struct Plain {
  static __device__ __forceinline__ float at(const Weight& w, u32 block) {
    return static_cast<const float*>(w.scales)[block];
  }
};

struct Doubled {
  static __device__ __forceinline__ float at(const Weight& w, u32 block) {
    return w.map[static_cast<const u8*>(w.more)[block]] * w.nested[block / 256] + *w.offset;
  }
};

template <typename Code, typename Scales, typename W, typename B>
struct Codes {
  static constexpr int BYTES = 4;
  using Scale = float;
  const Weight& w;
  const float* table;
  // Blocks are powers of two.
  int shift;

  __device__ Codes(const Weight& w, const float* table)
      : w(w), table(table), shift(31 - __clz((int)(w.block / 8))) {}
  static __device__ float code(int q) { return Code::value(q); }

  __device__ __forceinline__ const u8* place(Unit at) const { return w.bytes + (i64)at.index * 4; }
  __device__ __forceinline__ float scale(Unit at) const { return Scales::at(w, at.index >> shift); }
  __device__ __forceinline__ void decode(const u32* words, float scale, float (&v)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = rounded<B>(table[*words >> (8 * (i / 2) + 4 * (1 - i % 2)) & 15] * scale);
  }
  __device__ float one(Element at) const {
    i64 flat = at.row * w.inn + at.column;
    int q = w.bytes[flat / 2] >> (flat % 2 ? 0 : 4) & 15;
    return rounded<B>(table[q] * Scales::at(w, (u32)(flat / w.block)));
  }
};

// --- One byte for each element, one scale for each row ---

struct I8 {
  static __device__ __forceinline__ float widen(u32 byte) { return (float)(signed char)byte; }
};

// Moved to f32's exponents, where subnormals become normal in the product.
struct E4m3 {
  static __device__ __forceinline__ float widen(u32 byte) {
    return __uint_as_float((byte & 0x80) << 24 | (byte & 0x7f) << 20) * __uint_as_float((127 + 120) << 23);
  }
};

struct E5m2 {
  static __device__ __forceinline__ float widen(u32 byte) {
    return __uint_as_float((byte & 0x80) << 24 | (byte & 0x7f) << 21) * __uint_as_float((127 + 112) << 23);
  }
};

// q · scale, with scales of the weight's dtype.
template <typename Byte, typename W, typename B>
struct Bytes {
  static constexpr int BYTES = 8;
  using Scale = float;
  const Weight& w;

  __device__ Bytes(const Weight& w, const float*) : w(w) {}
  static __device__ float code(int) { return 0; }

  __device__ __forceinline__ float of_row(i64 row) const { return to_float(static_cast<const W*>(w.scales)[row]); }
  __device__ __forceinline__ const u8* place(Unit at) const { return w.bytes + (i64)at.index * 8; }
  __device__ __forceinline__ float scale(Unit at) const { return of_row(at.row); }
  __device__ __forceinline__ void decode(const u32* words, float scale, float (&v)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = rounded<B>(Byte::widen(words[i / 4] >> 8 * (i % 4) & 255) * scale);
  }
  __device__ float one(Element at) const {
    return rounded<B>(Byte::widen(w.bytes[at.row * w.inn + at.column]) * of_row(at.row));
  }
};

// bitsandbytes' 8 bits: q · absmax · (1 / 127), with a maximum in f32.
template <typename W, typename B>
struct Absmax {
  static constexpr int BYTES = 8;
  using Scale = float;
  const Weight& w;

  __device__ Absmax(const Weight& w, const float*) : w(w) {}
  static __device__ float code(int) { return 0; }

  __device__ __forceinline__ float value(u32 byte, float absmax) const {
    return rounded<B>(I8::widen(byte) * absmax * 0.007874015718698502f);
  }
  __device__ __forceinline__ const u8* place(Unit at) const { return w.bytes + (i64)at.index * 8; }
  __device__ __forceinline__ float scale(Unit at) const { return static_cast<const float*>(w.scales)[at.row]; }
  __device__ __forceinline__ void decode(const u32* words, float scale, float (&v)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = value(words[i / 4] >> 8 * (i % 4) & 255, scale);
  }
  __device__ float one(Element at) const {
    return value(w.bytes[at.row * w.inn + at.column], static_cast<const float*>(w.scales)[at.row]);
  }
};

// --- optimum-quanto's 4 and 2 bits: scale · q − shift ---

// Byte row r holds group r in its lowest bits, then group r + packed_rows, and
// so on.
template <int BITS, typename W, typename B>
struct Groups {
  static constexpr int BYTES = 8;
  struct Scale {
    float scale, shift;
    int bit;
  };
  const Weight& w;
  u32 units;

  __device__ Groups(const Weight& w, const float*) : w(w), units((u32)(w.block / 8)) {}
  static __device__ float code(int) { return 0; }

  __device__ __forceinline__ float value(u32 byte, Scale s) const {
    float q = (float)(byte >> s.bit & ((1 << BITS) - 1));
    return rounded<B>(rounded<W>(q * s.scale) - s.shift);
  }
  // In the 32 bits of a unit's numbers, or 64.
  template <typename Index>
  __device__ __forceinline__ Scale of_group(Index group) const {
    return {to_float(static_cast<const W*>(w.scales)[group]), to_float(static_cast<const W*>(w.more)[group]),
            (int)(group / (Index)w.packed_rows) * BITS};
  }
  __device__ __forceinline__ const u8* place(Unit at) const {
    u32 group = at.index / units, row = group % (u32)w.packed_rows;
    return w.bytes + ((i64)row * units + at.index % units) * 8;
  }
  __device__ __forceinline__ Scale scale(Unit at) const { return of_group(at.index / units); }
  __device__ __forceinline__ void decode(const u32* words, Scale scale, float (&v)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = value(words[i / 4] >> 8 * (i % 4) & 255, scale);
  }
  __device__ float one(Element at) const {
    i64 flat = at.row * w.inn + at.column, group = flat / w.block;
    return value(w.bytes[group % w.packed_rows * w.block + flat % w.block], of_group(group));
  }
};

// --- Two codes in a byte, the even element in the low half ---

__constant__ const float E2M1_VALUES[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                            -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// MXFP4: e2m1 floats, and a power of two for 32 of them. Rows begin with a byte
// and a power of their own.
template <typename W, typename B>
struct Powers {
  static constexpr int BYTES = 4;
  using Scale = float;
  const Weight& w;
  const float* table;

  __device__ Powers(const Weight& w, const float* table) : w(w), table(table) {}
  static __device__ float code(int q) { return E2M1_VALUES[q]; }

  // The value of an e8m0 byte: 2^(byte − 127); 2^-127 is subnormal.
  __device__ __forceinline__ float power(i64 row, i64 column) const {
    u32 byte = static_cast<const u8*>(w.scales)[row * ((w.inn + 31) / 32) + column / 32];
    return __uint_as_float(byte == 0 ? 1u << 22 : byte << 23);
  }
  __device__ __forceinline__ const u8* place(Unit at) const { return w.bytes + (i64)at.index * 4; }
  __device__ __forceinline__ float scale(Unit at) const { return power(at.row, (i64)at.column * 8); }
  __device__ __forceinline__ void decode(const u32* words, float scale, float (&v)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = rounded<B>(table[*words >> 4 * i & 15] * scale);
  }
  __device__ float one(Element at) const {
    int q = w.bytes[at.row * ((w.inn + 1) / 2) + at.column / 2] >> 4 * (at.column % 2) & 15;
    return rounded<B>(table[q] * power(at.row, at.column));
  }
};

// GPTQ's 4 bits: scale · (q − zero), in groups of an even number of columns,
// in order.
template <typename W, typename B>
struct Zeros {
  static constexpr int BYTES = 4;
  struct Scale {
    float scale, zero;
  };
  const Weight& w;
  u32 units;

  __device__ Zeros(const Weight& w, const float*) : w(w), units((u32)(w.block / 8)) {}
  static __device__ float code(int) { return 0; }

  __device__ __forceinline__ Scale of_group(i64 group) const {
    return {to_float(static_cast<const W*>(w.scales)[group]), (float)static_cast<const u8*>(w.more)[group]};
  }
  __device__ __forceinline__ float value(u32 q, Scale s) const { return rounded<B>(((float)q - s.zero) * s.scale); }
  __device__ __forceinline__ const u8* place(Unit at) const { return w.bytes + (i64)at.index * 4; }
  __device__ __forceinline__ Scale scale(Unit at) const { return of_group(at.index / units); }
  __device__ __forceinline__ void decode(const u32* words, Scale scale, float (&v)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = value(*words >> 4 * i & 15, scale);
  }
  __device__ float one(Element at) const {
    i64 flat = at.row * w.inn + at.column;
    return value(w.bytes[flat / 2] >> 4 * (flat % 2) & 15, of_group(flat / w.block));
  }
};
