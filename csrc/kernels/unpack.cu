// Unpacks rows and columns of a weight, or rows that an index lists.
//
// Compiled with FORMAT, a format of formats.cuh; W, the weight's dtype; and T,
// the result's. Bytes are read once and values written once, 16 bytes a thread,
// neighbours by neighbouring threads.
#include "formats.cuh"

struct Unpack {
  Weight weight;
  // T (rows, width).
  void* out;
  // i64 (rows), or null: rows from `row` on.
  const i64* index;
  i64 row;
  i64 rows;
  // Of the weight, to find rows of the index that it doesn't have.
  i64 all_rows;
  i64 column;
  i64 width;
};

using B = Before<W, T>::type;
using Format = FORMAT;

// Units that a thread has under way at a time.
constexpr int DEPTH = 4;
constexpr int THREADS = 256;

__device__ __forceinline__ i64 row_of(const Unpack& p, i64 row) { return p.index ? p.index[row] : p.row + row; }

// For widths, columns, rows and blocks of whole units, all numbers of which fit 32 bits.
KERNEL(unpack_units, Unpack, 256) {
  TABLE(format);
  const u32 of_row = (u32)(p.weight.inn / 8), width = (u32)(p.width / 8), first = (u32)(p.column / 8);
  const u32 total = width * (u32)p.rows, part = THREADS * DEPTH;
  T* out = static_cast<T*>(p.out);
  for (u32 start = blockIdx.x * part + threadIdx.x; start < total; start += gridDim.x * part) {
    u32 words[DEPTH][Format::BYTES / 4];
    Format::Scale scales[DEPTH];
    bool there[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      u32 i = start + d * THREADS;
      if (i >= total) break;
      i64 row = row_of(p, i / width);
      u32 column = first + i % width;
      there[d] = (u64)row < (u64)p.all_rows;
      if (!there[d]) continue;
      Unit at{(u32)row * of_row + column, (u32)row, column};
      load<Format::BYTES / 4>(format.place(at), words[d]);
      scales[d] = format.scale(at);
    }
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      u32 i = start + d * THREADS;
      if (i >= total) break;
      float values[8];
      if (there[d]) {
        format.decode(words[d], scales[d], values);
      } else {
        for (int k = 0; k < 8; k++) values[k] = __uint_as_float(0x7fc00000);
      }
      store8(out + (i64)i * 8, values);
    }
  }
}

// For any others, one element at a time.
KERNEL(unpack_elements, Unpack, 256) {
  TABLE(format);
  const i64 total = p.width * p.rows;
  for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < total; i += (i64)gridDim.x * THREADS) {
    i64 row = row_of(p, i / p.width);
    bool there = (u64)row < (u64)p.all_rows;
    float value = there ? format.one({row, p.column + i % p.width}) : __uint_as_float(0x7fc00000);
    static_cast<T*>(p.out)[i] = from_float<T>(value);
  }
}
