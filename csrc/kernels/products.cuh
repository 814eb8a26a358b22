// What products straight from the packed bytes share, in both directions.
//
// Programs are compiled with FORMAT, W and T as unpack.cu is, where T is the
// dtype of activations; and with TENSOR_CORES where W and T are the same 16 bits
// and the device multiplies these.
#pragma once
#include "formats.cuh"

// Values that are rounded to W by `decode`, and by being packed.
namespace exact {
using B = W;
using Format = FORMAT;
}  // namespace exact
namespace packed {
using B = float;
using Format = FORMAT;
}  // namespace packed

constexpr int LANES = 32;

#ifdef TENSOR_CORES
template <typename A>
struct IsBf16 {
  static constexpr bool value = false;
};
template <>
struct IsBf16<bf16> {
  static constexpr bool value = true;
};

// d += a · b: a (16, 16) and b (16, 8) of T, d (16, 8) of f32.
__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#ifdef __CUDA_ARCH__
  if (IsBf16<T>::value) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  mma_m16n8k16(d, a, b0, b1, [](u16 bits) { return to_float(T{bits}); });
#endif
}
#endif
