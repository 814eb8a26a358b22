// A step of AdamW with block-wise 8-bit moments, in one pass: the counterpart
// of src/train/optim/adamw8bit.rs, in the same order. Compiled with T, the
// parameter's dtype.
//
// Sums of two products are fused where libtorch's operators fuse them on a CPU
// with FMA; elsewhere the last bit of a moment may differ, and so may its code,
// by one, where a moment lies half-way between two.
#include "common.cuh"

constexpr int THREADS = 256;

struct Step {
  T* param;
  const T* grad;
  // u8 codes (count) and f32 scales for 256 of them, of both moments.
  u8* first;
  float* first_scales;
  u8* second;
  float* second_scales;
  // Of both codes: 256 rising values, and the 255 middles between them.
  const float* first_values;
  const float* first_middles;
  const float* second_values;
  const float* second_middles;
  i64 count;
  double beta1;
  // 1 - beta1 and 1 - beta2, taken in f64.
  double rest1;
  double beta2;
  double rest2;
  // What the parameter is multiplied by first, 1 without weight decay.
  double keep;
  // -lr over the first correction.
  double rate;
  // The root of the second correction.
  double correction;
  double eps;
};

// The number of the nearest value, the lower of two equally near.
__device__ __forceinline__ u8 nearest(const float* middles, float v) {
  int low = 0, high = 255;
  while (low < high) {
    int middle = (low + high) / 2;
    if (middles[middle] >= v)
      high = middle;
    else
      low = middle + 1;
  }
  return (u8)low;
}

// A block of threads for each block of values.
KERNEL(adamw8bit, Step, 256) {
  __shared__ float tables[4][256];
  __shared__ float maxima[2][THREADS / 32];
  const int i = threadIdx.x, warp = i / 32;
  tables[0][i] = p.first_values[i];
  tables[1][i] = p.second_values[i];
  if (i < 255) {
    tables[2][i] = p.first_middles[i];
    tables[3][i] = p.second_middles[i];
  }
  __syncthreads();
  const i64 blocks = (p.count + THREADS - 1) / THREADS;
  for (i64 block = blockIdx.x; block < blocks; block += gridDim.x) {
    const i64 at = block * THREADS + i;
    const bool there = at < p.count;
    float m = 0.0f, v = 0.0f;
    if (there) {
      const float g = to_float(p.grad[at]);
      m = fmaf((float)p.rest1, g, tables[0][p.first[at]] * p.first_scales[block] * (float)p.beta1);
      v = tables[1][p.second[at]] * p.second_scales[block] * (float)p.beta2 + (float)p.rest2 * g * g;
      const float root = sqrtf(v) / (float)p.correction + (float)p.eps;
      const float param = to_float(p.param[at]) * (float)p.keep;
      p.param[at] = from_float<T>(param + (float)p.rate * m / root);
    }
    const float largest[2] = {warp_max(fabsf(m)), warp_max(fabsf(v))};
    // All have read the scales and the maxima of the block before.
    __syncthreads();
    if (i % 32 == 0) {
      maxima[0][warp] = largest[0];
      maxima[1][warp] = largest[1];
    }
    __syncthreads();
    float scales[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
      scales[k] = maxima[k][0];
      for (int w = 1; w < THREADS / 32; w++) scales[k] = larger(scales[k], maxima[k][w]);
    }
    if (there) {
      // A block of zeros is divided by 1.
      p.first[at] = nearest(tables[2], m / (scales[0] == 0.0f ? 1.0f : scales[0]));
      p.second[at] = nearest(tables[3], v / (scales[1] == 0.0f ? 1.0f : scales[1]));
    }
    if (i == 0) {
      p.first_scales[block] = scales[0];
      p.second_scales[block] = scales[1];
    }
  }
}
