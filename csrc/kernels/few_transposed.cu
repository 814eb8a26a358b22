// dX = dY · W for at most sixteen rows of dY, straight from the packed bytes.
//
// T is the dtype of dY and dX. Blocks share W's columns out among them, and
// parts of its rows; the warps of a block share out the rows of its part. Sums
// are in f32, in an order that depends on the shapes only: of each warp, of the
// warps of a block, and of the parts, which `add_parts` adds up.
#include "products.cuh"

struct Transposed {
  Weight weight;
  // (n, out).
  const T* g;
  // (parts, n, inn).
  float* sums;
  i64 n;
  i64 out;
  // Rows of W in a part.
  i64 part;
};

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / LANES;
// Rows of dY that a thread or product takes.
constexpr int G_ROWS = 8;
// From one value of all lanes to the next, so that the banks of a lane's values differ too.
constexpr int PITCH = LANES + 1;

__device__ __forceinline__ u32 end_of(const Transposed& p, u32 part) {
  const i64 end = (part + 1) * p.part;
  return (u32)(end < p.out ? end : p.out);
}

// The sum of what all warps have at a place.
template <int VALUES>
__device__ __forceinline__ float of_warps(const float (&sums)[WARPS][VALUES], u32 place) {
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < WARPS; warp++) sum += sums[warp][place];
  return sum;
}

// --- For any dtypes: a lane for each eight columns, eight rows of dY at a time ---

// Rows of W that a warp has under way.
constexpr int DEPTH = 4;

KERNEL(transposed_by_rows, Transposed, 256) {
  using exact::Format;
  TABLE(format);
  __shared__ float sums[WARPS][8 * PITCH];
  const u32 lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, units = (u32)(p.weight.inn / 8);
  const u32 groups = (u32)(p.n + G_ROWS - 1) / G_ROWS, part = blockIdx.y / groups, first = blockIdx.y % groups * G_ROWS;
  const u32 column = blockIdx.x * LANES + lane, end = end_of(p, part);
  const int count = (int)(p.n - first < G_ROWS ? p.n - first : G_ROWS);
  float d[G_ROWS][8] = {};
  if (column < units) {
    for (u32 start = part * (u32)p.part + warp * DEPTH; start < end; start += WARPS * DEPTH) {
      u32 words[DEPTH][Format::BYTES / 4];
      Format::Scale scales[DEPTH];
#pragma unroll
      for (int r = 0; r < DEPTH; r++) {
        if (start + r >= end) break;
        Unit at{(start + r) * units + column, start + r, column};
        load<Format::BYTES / 4>(format.place(at), words[r]);
        scales[r] = format.scale(at);
      }
#pragma unroll
      for (int r = 0; r < DEPTH; r++) {
        if (start + r >= end) break;
        float w[8];
        format.decode(words[r], scales[r], w);
#pragma unroll
        for (int k = 0; k < G_ROWS; k++) {
          if (k >= count) break;
          const float g = to_float(p.g[(first + k) * p.out + start + r]);
#pragma unroll
          for (int i = 0; i < 8; i++) d[k][i] = fmaf(w[i], g, d[k][i]);
        }
      }
    }
  }
  const u32 of_weight = blockIdx.x * THREADS + threadIdx.x;
#pragma unroll
  for (int k = 0; k < G_ROWS; k++) {
    if (k >= count) break;
#pragma unroll
    for (int i = 0; i < 8; i++) sums[warp][i * PITCH + lane] = d[k][i];
    __syncthreads();
    const float sum = of_warps(sums, threadIdx.x % 8 * PITCH + threadIdx.x / 8);
    if (of_weight < (u32)p.weight.inn) p.sums[(part * p.n + first + k) * p.weight.inn + of_weight] = sum;
    __syncthreads();
  }
}

#ifdef TENSOR_CORES
// --- For weights and activations of the same 16 bits: tensor cores ---
//
// In a step a warp takes sixteen rows of W. Each lane reads eight bytes of four
// of them, and pairs what lies below each other as fragments of mma.m16n8k16,
// whose a is Wᵀ and whose b is dYᵀ. As in few.cu, which columns and rows meet
// in one product is of no matter. Blocks are whole numbers of eight bytes.

constexpr int UNITS = 8 / packed::Format::BYTES;
constexpr int CHUNK = 8 * UNITS;

// Four neighbours of row n of dY, two in a word, with zeros after its end.
__device__ __forceinline__ void load_g(const Transposed& p, u32 n, u32 row, u32 (&words)[2]) {
  words[0] = words[1] = 0;
  if (n >= (u32)p.n) return;
  const T* from = p.g + n * p.out + row;
  if (p.out % 4 == 0) {
    if (row < (u32)p.out) load<2>(reinterpret_cast<const u8*>(from), words);
  } else {
    for (int i = 0; i < 4; i++) {
      if (row + i < (u32)p.out) words[i / 2] |= (u32)from[i].bits << 16 * (i % 2);
    }
  }
}

// For at most 8 · G_TILES rows of dY.
template <int G_TILES, typename Format>
__device__ __forceinline__ void transposed(const Transposed& p, const Format& format) {
  constexpr int COLUMNS = 8 * CHUNK;
  __shared__ float sums[WARPS][2 * CHUNK * PITCH];
  const u32 lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, group = lane / 4, quad = lane % 4;
  const u32 units = (u32)(p.weight.inn / 8), part = blockIdx.y, end = end_of(p, part);
  u32 column = (blockIdx.x * 8 + group) * UNITS;
  // What a column too many gives is not stored, and a row too many meets zeros.
  if (column >= units) column = units - UNITS;
  float d[G_TILES][CHUNK / 2][4] = {};
  for (u32 start = part * (u32)p.part + 16 * warp; start < end; start += 16 * WARPS) {
    const u32 first = start + 4 * quad;
    u32 words[4][2];
    typename Format::Scale scales[4];
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const u32 row = first + r < (u32)p.out ? first + r : (u32)p.out - 1;
      Unit at{row * units + column, row, column};
      load<2>(format.place(at), words[r]);
      scales[r] = format.scale(at);
    }
    u32 g[G_TILES][2];
#pragma unroll
    for (int t = 0; t < G_TILES; t++) load_g(p, G_ROWS * t + group, first, g[t]);
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
      float w[4][8];
#pragma unroll
      for (int r = 0; r < 4; r++) format.decode(&words[r][u * Format::BYTES / 4], scales[r], w[r]);
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const u32 a[4] = {pack2<T>(w[0][i], w[1][i]), pack2<T>(w[0][i + 1], w[1][i + 1]),
                          pack2<T>(w[2][i], w[3][i]), pack2<T>(w[2][i + 1], w[3][i + 1])};
#pragma unroll
        for (int t = 0; t < G_TILES; t++) multiply(d[t][4 * u + i / 2], a, g[t][0], g[t][1]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < G_TILES; t++) {
    // A lane has a chunk of columns for two rows of dY.
#pragma unroll
    for (int i = 0; i < CHUNK / 2; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) sums[warp][(2 * i + e / 2 + CHUNK * (e % 2)) * PITCH + lane] = d[t][i][e];
    }
    __syncthreads();
    for (u32 at = threadIdx.x; at < G_ROWS * COLUMNS; at += THREADS) {
      const u32 k = at / COLUMNS, c = at % COLUMNS, n = G_ROWS * t + k, of_weight = blockIdx.x * COLUMNS + c;
      const float sum = of_warps(sums, (c % CHUNK + CHUNK * (k % 2)) * PITCH + c / CHUNK * 4 + k / 2);
      if (of_weight < (u32)p.weight.inn && n < (u32)p.n) p.sums[(part * p.n + n) * p.weight.inn + of_weight] = sum;
    }
    __syncthreads();
  }
}

KERNEL(transposed_of_8, Transposed, 256) {
  using packed::Format;
  TABLE(format);
  transposed<1>(p, format);
}

KERNEL(transposed_of_16, Transposed, 256) {
  using packed::Format;
  TABLE(format);
  transposed<2>(p, format);
}
#endif

struct Parts {
  // (parts, total), and (total).
  const float* sums;
  T* dx;
  i64 parts;
  i64 total;
};

KERNEL(add_parts, Parts, 256) {
  for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < p.total; i += (i64)gridDim.x * THREADS) {
    float sum = 0;
    for (i64 part = 0; part < p.parts; part++) sum += p.sums[part * p.total + i];
    p.dx[i] = from_float<T>(sum);
  }
}
