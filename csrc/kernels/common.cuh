// What all kernels share: integer and float types, their conversions, and how a
// kernel is declared. No header of CUDA's is needed, so that NVRTC compiles
// them wherever torch put it; and the same text is compiled for the CPU by
// tests/cuda_emulation.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

// Sixteen bytes, the most that one thread loads or stores at a time.
struct alignas(16) Vec16 {
  u32 words[4];
};

// A kernel `name` of blocks of `threads` threads. `Parameters` is a struct of
// fields of eight bytes (pointers, i64, double), in the order of the arguments
// of its launch; the body sees them as `p`.
#ifndef KERNEL
#define KERNEL(name, Parameters, threads)                                                      \
  static_assert(sizeof(Parameters) % 8 == 0 && sizeof(Parameters) <= 512, "see Launch::words"); \
  extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Parameters p)
#endif

// --- Floats of 16 bits ---

struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};
using f32 = float;

__device__ __forceinline__ float to_float(float v) { return v; }

__device__ __forceinline__ float to_float(bf16 v) { return __uint_as_float((u32)v.bits << 16); }

__device__ __forceinline__ float to_float(f16 v) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
  return wide;
#else
  // Moved to f32's exponents, where subnormals become normal in the product.
  u32 magnitude = v.bits & 0x7fff;
  float wide = magnitude >= 0x7c00 ? __uint_as_float(0x7f800000 | (magnitude & 0x3ff) << 13)
                                   : __uint_as_float(magnitude << 13) * __uint_as_float((127 + 112) << 23);
  return __uint_as_float(__float_as_uint(wide) | (u32)(v.bits & 0x8000) << 16);
#endif
}

// The nearest value, ties to even.
template <typename T>
__device__ T from_float(float v);

template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}

template <>
__device__ __forceinline__ bf16 from_float<bf16>(float v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  bf16 narrow;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(v));
  return narrow;
#else
  u32 bits = __float_as_uint(v);
  if ((bits & 0x7fffffff) > 0x7f800000) return bf16{(u16)(bits >> 16 | 0x40)};
  return bf16{(u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
}

template <>
__device__ __forceinline__ f16 from_float<f16>(float v) {
#ifdef __CUDA_ARCH__
  f16 narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(v));
  return narrow;
#else
  u32 bits = __float_as_uint(v), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return f16{(u16)(sign | 0x7e00)};
  if (magnitude >= 0x47800000) return f16{(u16)(sign | 0x7c00)};
  if (magnitude < 0x38800000) {
    // Subnormal in f16: the sum with 0.5 leaves its digits at the end.
    u32 digits = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000;
    return f16{(u16)(sign | digits)};
  }
  u32 rounded = magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1);
  return f16{(u16)(sign | rounded >> 13)};
#endif
}

// The nearest value of `T`, as f32.
template <typename T>
__device__ __forceinline__ float rounded(float v) {
  return to_float(from_float<T>(v));
}

// Two values in one word, the first in its low half.
template <typename T>
__device__ __forceinline__ u32 pack2(float low, float high) {
  return from_float<T>(low).bits | (u32)from_float<T>(high).bits << 16;
}

#if defined(__CUDA_ARCH__)
template <>
__device__ __forceinline__ u32 pack2<f16>(float low, float high) {
  u32 both;
  asm("{ .reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h}; }"
      : "=r"(both)
      : "f"(low), "f"(high));
  return both;
}
#if __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ u32 pack2<bf16>(float low, float high) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
#endif
#endif

// --- The largest of several values ---

// NaN wins, as in libtorch.
__device__ __forceinline__ float larger(float a, float b) { return a > b || a != a ? a : b; }

__device__ __forceinline__ float warp_max(float v) {
  for (int mask = 16; mask > 0; mask /= 2) v = larger(v, __shfl_xor_sync(0xffffffff, v, mask));
  return v;
}

// --- Several elements at a time ---

// Loads 4, 8 or 16 bytes at once, from a multiple of as many.
template <int WORDS>
__device__ __forceinline__ void load(const u8* from, u32* words) {
  struct alignas(4 * WORDS) Vec {
    u32 words[WORDS];
  };
  Vec vec = *reinterpret_cast<const Vec*>(from);
#pragma unroll
  for (int i = 0; i < WORDS; i++) words[i] = vec.words[i];
}

// Stores eight consecutive values, at a multiple of 16 bytes.
__device__ __forceinline__ void store8(float* to, const float (&v)[8]) {
  for (int half = 0; half < 2; half++) {
    Vec16 words;
    for (int i = 0; i < 4; i++) words.words[i] = __float_as_uint(v[4 * half + i]);
    reinterpret_cast<Vec16*>(to)[half] = words;
  }
}

template <typename T>
__device__ __forceinline__ void store8(T* to, const float (&v)[8]) {
  Vec16 words;
  for (int i = 0; i < 4; i++) words.words[i] = pack2<T>(v[2 * i], v[2 * i + 1]);
  *reinterpret_cast<Vec16*>(to) = words;
}

// Loads eight consecutive values, from a multiple of 16 bytes.
__device__ __forceinline__ void load8(const float* from, float (&v)[8]) {
  for (int half = 0; half < 2; half++) {
    Vec16 words = reinterpret_cast<const Vec16*>(from)[half];
    for (int i = 0; i < 4; i++) v[4 * half + i] = __uint_as_float(words.words[i]);
  }
}

template <typename T>
__device__ __forceinline__ void load8(const T* from, float (&v)[8]) {
  Vec16 words = *reinterpret_cast<const Vec16*>(from);
  for (int i = 0; i < 4; i++) {
    v[2 * i] = to_float(T{(u16)words.words[i]});
    v[2 * i + 1] = to_float(T{(u16)(words.words[i] >> 16)});
  }
}
