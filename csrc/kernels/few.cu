// y = x · Wᵀ for at most sixteen rows of x, straight from the packed bytes.
//
// T is the dtype of x and y. Sums are in f32, in an order that depends on the
// shapes only.
#include "products.cuh"

struct Product {
  Weight weight;
  // (n, inn) and (n, out).
  const T* x;
  T* y;
  i64 n;
  i64 out;
};

// --- For any dtypes: a warp for each row of W, eight rows of x at a time ---

constexpr int X_ROWS = 8;

KERNEL(product_by_rows, Product, 256) {
  using exact::Format;
  TABLE(format);
  const u32 lane = threadIdx.x % LANES;
  const i64 row = (i64)blockIdx.x * (256 / LANES) + threadIdx.x / LANES, first = (i64)blockIdx.y * X_ROWS;
  if (row >= p.out) return;
  const u32 units = (u32)(p.weight.inn / 8);
  const int count = (int)(p.n - first < X_ROWS ? p.n - first : X_ROWS);
  float sums[X_ROWS] = {};
  for (u32 column = lane; column < units; column += LANES) {
    Unit at{(u32)row * units + column, (u32)row, column};
    u32 words[Format::BYTES / 4];
    load<Format::BYTES / 4>(format.place(at), words);
    float w[8];
    format.decode(words, format.scale(at), w);
#pragma unroll
    for (int k = 0; k < X_ROWS; k++) {
      if (k >= count) break;
      float x[8];
      load8(p.x + (first + k) * p.weight.inn + (i64)column * 8, x);
#pragma unroll
      for (int i = 0; i < 8; i++) sums[k] = fmaf(w[i], x[i], sums[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < X_ROWS; k++) {
    for (int mask = LANES / 2; mask > 0; mask /= 2) sums[k] += __shfl_xor_sync(0xffffffff, sums[k], mask);
    if (lane == 0 && k < count) p.y[(first + k) * p.out + row] = from_float<T>(sums[k]);
  }
}

#ifdef TENSOR_CORES
// --- For weights and activations of the same 16 bits: tensor cores ---
//
// A block takes 16 · TILES rows of W, and its warps share the columns out among
// them. In a step each quad of lanes reads 4 · CHUNK columns of a row, 16 bytes
// a lane, and multiplies them as fragments of mma.m16n8k16. Which columns meet
// in one product is of no matter as long as x's are chosen alike, so lanes take
// what lies next to each other. Rows and blocks are whole numbers of these.

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / LANES;
constexpr int TILES = 2;
constexpr int UNITS = 16 / packed::Format::BYTES;
constexpr int CHUNK = 8 * UNITS;

// For at most 8 · X_TILES rows of x.
template <int X_TILES, typename Format>
__device__ __forceinline__ void product(const Product& p, const Format& format) {
  constexpr int ROWS = 16 * TILES, COLUMNS = 8 * X_TILES;
  __shared__ float sums[WARPS][ROWS][COLUMNS];
  const u32 lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, group = lane / 4, quad = lane % 4;
  const u32 units = (u32)(p.weight.inn / 8), steps = units / (4 * UNITS);
  u32 rows[TILES][2];
  for (int m = 0; m < TILES; m++) {
    for (int half = 0; half < 2; half++) {
      u32 row = blockIdx.x * ROWS + 16 * m + 8 * half + group;
      // What a row too many gives is not stored.
      rows[m][half] = row < (u32)p.out ? row : (u32)p.out - 1;
    }
  }
  float d[TILES][X_TILES][4] = {};
  for (u32 step = warp; step < steps; step += WARPS) {
    const u32 column = (step * 4 + quad) * UNITS;
    u32 words[TILES][2][4];
    typename Format::Scale scales[TILES][2];
#pragma unroll
    for (int m = 0; m < TILES; m++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        Unit at{rows[m][half] * units + column, rows[m][half], column};
        load<4>(format.place(at), words[m][half]);
        scales[m][half] = format.scale(at);
      }
    }
    u32 x[X_TILES][CHUNK / 2];
#pragma unroll
    for (int t = 0; t < X_TILES; t++) {
      const u32 n = 8 * t + group;
      const u8* from = reinterpret_cast<const u8*>(p.x + n * p.weight.inn + (i64)column * 8);
#pragma unroll
      for (int i = 0; i < CHUNK / 2; i += 4) {
        if (n < (u32)p.n) {
          load<4>(from + 4 * i, &x[t][i]);
        } else {
          for (int k = 0; k < 4; k++) x[t][i + k] = 0;
        }
      }
    }
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
#pragma unroll
      for (int m = 0; m < TILES; m++) {
        u32 w[2][4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float v[8];
          format.decode(&words[m][half][u * Format::BYTES / 4], scales[m][half], v);
#pragma unroll
          for (int i = 0; i < 4; i++) w[half][i] = pack2<T>(v[2 * i], v[2 * i + 1]);
        }
        const u32 a[2][4] = {{w[0][0], w[1][0], w[0][1], w[1][1]}, {w[0][2], w[1][2], w[0][3], w[1][3]}};
#pragma unroll
        for (int t = 0; t < X_TILES; t++) {
          multiply(d[m][t], a[0], x[t][4 * u], x[t][4 * u + 1]);
          multiply(d[m][t], a[1], x[t][4 * u + 2], x[t][4 * u + 3]);
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < TILES; m++) {
#pragma unroll
    for (int t = 0; t < X_TILES; t++) {
#pragma unroll
      for (int i = 0; i < 4; i++) sums[warp][16 * m + 8 * (i / 2) + group][8 * t + 2 * quad + i % 2] = d[m][t][i];
    }
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < ROWS * COLUMNS; i += THREADS) {
    const u32 row = i % ROWS, n = i / ROWS, of_weight = blockIdx.x * ROWS + row;
    float sum = 0;
    for (int from = 0; from < WARPS; from++) sum += sums[from][row][n];
    if (of_weight < (u32)p.out && n < (u32)p.n) p.y[n * p.out + of_weight] = from_float<T>(sum);
  }
}

KERNEL(product_of_8, Product, 512) {
  using packed::Format;
  TABLE(format);
  product<1>(p, format);
}

KERNEL(product_of_16, Product, 512) {
  using packed::Format;
  TABLE(format);
  product<2>(p, format);
}
#endif
